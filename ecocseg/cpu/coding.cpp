// Coding maths on a CPU, in one pass over the pixels: bilinear upsampling, then losses with their gradient, or pseudo-labels.
//
// Rows of an image are taken one by one. Of a row's two rows of cells one blended row is made (C maps of w cells); its pixels
// are computed phase by phase: the pixels with the same place between two cells, whose values are then contiguous in the
// blended row. TILE of them at a time go through all the maths while they are in the nearest cache.
//
// C maps: the K outputs and, behind them, for the ECOC loss, their N products with the codewords' signs (made of cells, since
// products are linear and so is resizing). h w cells, H W pixels. Formulas: ecocseg/losses.py and ecocseg/bits.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int TILE = 64;             // pixels: C x TILE floats stay in the nearest cache
constexpr int IGNORE = 255;
constexpr int FACTORS = 64;          // numbers in [1/2, 1] whose product is far from the least float
constexpr float COSINE_EPS = 1e-3f;  // as losses.COSINE_EPS
constexpr float SAFE_EXPONENT = 60.f;

inline float bits_to_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline uint32_t float_to_bits(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }

// exp and log by range reduction and Cephes' polynomials (S. Moshier), 1e-7 relative; plain code, which compilers vectorise.
inline float fast_exp(float x) {  // of numbers up to 88
    x = -87.f > x ? -87.f : x;  // NaN stays NaN
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    float y = x - n * 0.693359375f;
    y = y + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * y + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.f;
    return p * bits_to_float((float_to_bits(shifted) - 0x4B400000u + 127u) << 23);
}

inline float fast_log(float x) {  // of positive, normal numbers
    const uint32_t bits = float_to_bits(x) - 0x3F3504F3u;  // mantissa in [sqrt(1/2), sqrt(2))
    const float e = (float)((int32_t)bits >> 23);
    const float m = bits_to_float((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.f;
    const float z = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z + e * -2.12194440e-4f - 0.5f * z;
    return m + p + e * 0.693359375f;
}

}  // namespace

extern "C" {

// How labels lie over cells. Row y is made of cell rows row_cell[y] and the next (row_share[y] of it); pixel
// phases * i + r of a row of cells phase_cell[r] + i and the next (phase_share[r] of it). Cells outside repeat the edge.
struct Grid {
    int64_t cells_high, cells_wide, pixels_high, pixels_wide, phases;
    const int64_t *row_cell;
    const float *row_share;
    const int64_t *phase_cell;
    const float *phase_share;
};

struct LossOptions {
    float bce, distance, contrast, sharpness;  // weights, and 1 / temperature
    int64_t target_instead;                    // the target stands in for its class's codeword among the negatives
};

}  // extern "C"

namespace {

constexpr int64_t EDGE = 1;  // cells that a blended row repeats on its left

// A row of pixels: the blended row of cells, its gradient, and tiles of both.
struct Row {
    const Grid &g;
    const int64_t maps, stride;
    std::vector<float> blended, slopes;  // [C, stride]
    std::vector<float> values, gradient;  // [C, TILE]

    Row(const Grid &grid, int64_t maps, bool with_gradient)
        : g(grid), maps(maps), stride(grid.cells_wide + 2 * EDGE + 2 * TILE), blended(maps * stride),
          slopes(with_gradient ? maps * stride : 0), values(maps * TILE), gradient(with_gradient ? maps * TILE : 0) {}

    void neighbours(int64_t y, int64_t &above, int64_t &below) const {
        above = std::clamp<int64_t>(g.row_cell[y], 0, g.cells_high - 1);
        below = std::clamp<int64_t>(g.row_cell[y] + 1, 0, g.cells_high - 1);
    }

    void blend(const float *image, int64_t y) {
        int64_t above, below;
        neighbours(y, above, below);
        const float share = g.row_share[y];
        const int64_t w = g.cells_wide;
        for (int64_t c = 0; c < maps; c++) {
            const float *a = image + (c * g.cells_high + above) * w, *b = image + (c * g.cells_high + below) * w;
            float *to = blended.data() + c * stride;
            for (int64_t x = 0; x < w; x++) to[EDGE + x] = a[x] + share * (b[x] - a[x]);
            to[0] = to[EDGE];
            to[EDGE + w] = to[EDGE + w - 1];
        }
    }

    int64_t pixels_of(int64_t phase) const { return (g.pixels_wide - phase + g.phases - 1) / g.phases; }

    void take(int64_t phase, int64_t first) {
        const float share = g.phase_share[phase];
        for (int64_t c = 0; c < maps; c++) {
            const float *from = blended.data() + c * stride + EDGE + g.phase_cell[phase] + first;
            float *to = values.data() + c * TILE;
            for (int i = 0; i < TILE; i++) to[i] = from[i] + share * (from[i + 1] - from[i]);
        }
    }

    // Lanes behind the last pixel have weight 0, so their gradient is 0.
    void give_back(int64_t phase, int64_t first) {
        const float share = g.phase_share[phase];
        for (int64_t c = 0; c < maps; c++) {
            float *to = slopes.data() + c * stride + EDGE + g.phase_cell[phase] + first;
            const float *from = gradient.data() + c * TILE;
            for (int i = 0; i < TILE; i++) to[i] += from[i] * (1.f - share);
            for (int i = 0; i < TILE; i++) to[i + 1] += from[i] * share;
        }
    }

    void spread(float *image, int64_t y) {
        int64_t above, below;
        neighbours(y, above, below);
        const float share = g.row_share[y];
        const int64_t w = g.cells_wide;
        for (int64_t c = 0; c < maps; c++) {
            float *from = slopes.data() + c * stride;
            from[EDGE] += from[0];
            from[EDGE + w - 1] += from[EDGE + w];
            float *a = image + (c * g.cells_high + above) * w, *b = image + (c * g.cells_high + below) * w;
            for (int64_t x = 0; x < w; x++) a[x] += from[EDGE + x] * (1.f - share);
            if (share != 0.f)
                for (int64_t x = 0; x < w; x++) b[x] += from[EDGE + x] * share;
            std::memset(from, 0, sizeof(float) * (w + 2 * EDGE));  // behind it are lanes without a pixel, which stay 0
        }
    }
};

// What the pixels of a tile should be; lanes without a pixel, and ignored pixels, have weight 0.
struct TileTarget {
    int32_t label[TILE];
    float weight[TILE];
    std::vector<uint32_t> zeros;  // [2 X, TILE], 32 bits each, set where the target's bit is 0

    explicit TileTarget(int64_t words) : zeros(2 * words * TILE) {}

    void load(const Grid &g, const int64_t *labels, const float *weights, const uint64_t *words, int64_t num_words,
              int64_t y, int64_t phase, int64_t first, int64_t count, int64_t num_classes) {
        const int64_t plane = g.pixels_high * g.pixels_wide, start = y * g.pixels_wide + phase + first * g.phases;
        for (int i = 0; i < TILE; i++) label[i] = 0, weight[i] = 0.f;
        for (int64_t i = 0; i < count; i++) {
            const int64_t id = labels[start + i * g.phases];
            weight[i] = id == IGNORE ? 0.f : weights[start + i * g.phases];
            label[i] = (int32_t)std::min<int64_t>(id, num_classes - 1);
        }
        for (int64_t x = 0; x < num_words; x++)
            for (int64_t i = 0; i < count; i++) {
                const uint64_t word = ~words[x * plane + start + i * g.phases];
                zeros[2 * x * TILE + i] = (uint32_t)word;
                zeros[(2 * x + 1) * TILE + i] = (uint32_t)(word >> 32);
            }
    }
};

inline float with_sign(float value, uint32_t zeros, int bit) {  // -value where the target's bit is 0
    return bits_to_float(float_to_bits(value) ^ ((zeros >> bit) << 31));
}

// Loss of a tile as ecocseg.losses.ecoc_loss has it: adds to sums [3], writes the gradient of all maps. INSTEAD: the target
// stands in for its class's codeword among the negatives.
template <bool INSTEAD>
void ecoc_tile(Row &row, const TileTarget &target, int64_t num_bits, int64_t num_classes, const LossOptions &o, double *sums,
               bool with_gradient) {
    float size[TILE] = {}, square[TILE] = {}, dot[TILE] = {}, chance[TILE], log_sure[TILE] = {};
    std::fill(chance, chance + TILE, 1.f);
    for (int64_t k = 0; k < num_bits; k++) {
        const float *v = row.values.data() + k * TILE;
        const uint32_t *zeros = target.zeros.data() + (k / 32) * TILE;
        const int bit = k % 32;
        float *half = with_gradient ? row.gradient.data() + k * TILE : nullptr;
        for (int i = 0; i < TILE; i++) {
            const float a = std::fabs(v[i]), sure = 1.f / (1.f + fast_exp(-a));  // max(p, 1 - p)
            size[i] += a;
            square[i] += a * a;
            dot[i] += with_sign(v[i], zeros[i], bit);
            chance[i] *= sure;
            if (half) half[i] = std::copysign(sure - 0.5f, v[i]);
        }
        if (k % FACTORS == FACTORS - 1 || k == num_bits - 1)
            for (int i = 0; i < TILE; i++) log_sure[i] += fast_log(chance[i]), chance[i] = 1.f;
    }
    float scale[TILE], inverse[TILE], cosine[TILE], slope[TILE], radial[TILE], bce[TILE], far[TILE], contrast[TILE] = {};
    const float root = 1.f / std::sqrt((float)num_bits);
    for (int i = 0; i < TILE; i++) {
        const float w = target.weight[i];
        inverse[i] = 1.f / std::max(std::sqrt(square[i]), COSINE_EPS);
        scale[i] = inverse[i] * root;
        cosine[i] = dot[i] * scale[i];
        bce[i] = (0.5f * (size[i] - dot[i]) - log_sure[i]) * w / num_bits;
        far[i] = (1.f - cosine[i]) * w;
        slope[i] = -o.distance;
        radial[i] = 0.f;
    }
    if (o.contrast != 0.f) {
        float top[TILE] = {}, sum[TILE] = {}, factor[TILE], per_scale[TILE];
        float *e = row.gradient.data() + num_bits * TILE;
        const float *product = row.values.data() + num_bits * TILE;
        for (int i = 0; i < TILE; i++) per_scale[i] = scale[i] * o.sharpness;
        auto exponent = [&](int64_t n, int i) {
            const float x = product[n * TILE + i] * per_scale[i];
            return INSTEAD && target.label[i] == n ? cosine[i] * o.sharpness : x;
        };
        if (o.sharpness > SAFE_EXPONENT) {
            std::fill(top, top + TILE, -o.sharpness);
            for (int64_t n = 0; n < num_classes; n++)
                for (int i = 0; i < TILE; i++) top[i] = std::max(top[i], exponent(n, i));
        }
        for (int64_t n = 0; n < num_classes; n++)
            for (int i = 0; i < TILE; i++) {
                const float x = fast_exp(exponent(n, i) - top[i]);
                e[n * TILE + i] = x;
                sum[i] += x;
            }
        for (int i = 0; i < TILE; i++) {
            const float w = target.weight[i], per_sum = o.contrast * o.sharpness / sum[i];
            contrast[i] = (fast_log(sum[i]) + top[i] - cosine[i] * o.sharpness) * w;
            slope[i] -= o.contrast * o.sharpness;
            if (INSTEAD) slope[i] += e[target.label[i] * TILE + i] * per_sum;
            factor[i] = w * scale[i] * per_sum;
        }
        if (with_gradient)
            for (int64_t n = 0; n < num_classes; n++)
                for (int i = 0; i < TILE; i++) {
                    const float s = INSTEAD && target.label[i] == n ? 0.f : e[n * TILE + i] * factor[i];
                    e[n * TILE + i] = s;
                    radial[i] += product[n * TILE + i] * s;
                }
    }
    for (int i = 0; i < TILE; i++) sums[0] += bce[i], sums[1] += far[i], sums[2] += contrast[i];
    if (!with_gradient) return;
    float sign_slope[TILE], pull[TILE];
    for (int i = 0; i < TILE; i++) {
        const float w = target.weight[i], to_target = slope[i] * w * scale[i];
        const bool counts = square[i] > COSINE_EPS * COSINE_EPS;
        radial[i] = counts ? (radial[i] + to_target * dot[i]) * inverse[i] * inverse[i] : 0.f;
        sign_slope[i] = to_target - w * o.bce / (2.f * num_bits);
        pull[i] = w * o.bce / num_bits;
    }
    for (int64_t k = 0; k < num_bits; k++) {
        const float *v = row.values.data() + k * TILE;
        const uint32_t *zeros = target.zeros.data() + (k / 32) * TILE;
        float *half = row.gradient.data() + k * TILE;
        const int bit = k % 32;
        for (int i = 0; i < TILE; i++)
            half[i] = half[i] * pull[i] - v[i] * radial[i] + with_sign(sign_slope[i], zeros[i], bit);
    }
}

void cross_entropy_tile(Row &row, const TileTarget &target, int64_t num_classes, double *sums, bool with_gradient) {
    float top[TILE], sum[TILE] = {}, own[TILE];
    const float *values = row.values.data();
    std::memcpy(top, values, sizeof(top));
    for (int64_t n = 1; n < num_classes; n++)
        for (int i = 0; i < TILE; i++) top[i] = std::max(top[i], values[n * TILE + i]);
    for (int64_t n = 0; n < num_classes; n++)
        for (int i = 0; i < TILE; i++) {
            const float e = fast_exp(values[n * TILE + i] - top[i]);
            if (with_gradient) row.gradient[n * TILE + i] = e;
            sum[i] += e;
        }
    for (int i = 0; i < TILE; i++) {
        own[i] = (fast_log(sum[i]) + top[i] - values[target.label[i] * TILE + i]) * target.weight[i];
        sums[0] += own[i];
    }
    if (!with_gradient) return;
    float per_sum[TILE];
    for (int i = 0; i < TILE; i++) per_sum[i] = target.weight[i] / sum[i];
    for (int64_t n = 0; n < num_classes; n++)
        for (int i = 0; i < TILE; i++) row.gradient[n * TILE + i] *= per_sum[i];
    for (int i = 0; i < TILE; i++) row.gradient[target.label[i] * TILE + i] -= target.weight[i];
}

constexpr int LANES = 8;

// Place of the largest of numbers padded with -inf to whole LANES, the first among equals.
inline int64_t first_largest(const float *numbers, int64_t padded) {
    float most[LANES], best;
    std::memcpy(most, numbers, sizeof(most));
    for (int64_t n = LANES; n < padded; n += LANES)
        for (int j = 0; j < LANES; j++) most[j] = numbers[n + j] > most[j] ? numbers[n + j] : most[j];
    best = *std::max_element(most, most + LANES);
    int64_t place = 0;
    while (place < padded - 1 && numbers[place] != best) place++;
    return place;
}

// Reliable bits of one pixel that its nearest codeword alone does not settle, as ecocseg.bits.reliable_words has it. `surplus`
// (a column of a tile) is q - T of each bit, `sum` that of all bits, `hope` the bits above 0; `queue` the scores.
void mine(const float *surplus, double sum, const uint64_t *hope, int64_t num_bits, float *queue, int64_t padded,
          int64_t nearest, const uint64_t *codewords, int64_t num_classes, int64_t num_words, int64_t limit, uint64_t *shared) {
    uint64_t hopeful = 0;
    for (int64_t x = 0; x < num_words; x++) {
        shared[x] = x == num_words - 1 && num_bits % 64 ? (uint64_t(1) << (num_bits % 64)) - 1 : ~uint64_t(0);
        hopeful |= hope[x];
    }
    int64_t next = nearest;
    for (int64_t candidates = 2; hopeful && candidates <= limit; candidates++) {
        queue[next] = -INFINITY;
        next = first_largest(queue, padded);
        hopeful = 0;
        for (int64_t x = 0; x < num_words; x++) {
            uint64_t leaving = shared[x] & (codewords[x * num_classes + next] ^ codewords[x * num_classes + nearest]);
            shared[x] ^= leaving;
            hopeful |= shared[x] & hope[x];
            for (; leaving; leaving &= leaving - 1) sum -= surplus[(64 * x + __builtin_ctzll(leaving)) * TILE];
        }
        if (hopeful && sum > 0.) return;
    }
    std::fill(shared, shared + num_words, 0);
}

}  // namespace

extern "C" {

// Rows [first, end) of one image. Adds the three terms, each summed over pixels, to `sums`, and the gradient of their weighted
// sum to that of the maps where it is wanted. The last maps are products only if `contrast` is not 0.
void ecoc_loss(const Grid *grid, const float *maps, int64_t num_bits, int64_t num_classes, const int64_t *labels,
               const float *weights, const uint64_t *words, const LossOptions *options, int64_t first, int64_t end,
               double *sums, float *gradient) {
    const int64_t num_words = (num_bits + 63) / 64;
    Row row(*grid, num_bits + num_classes, true);
    TileTarget target(num_words);
    for (int64_t y = first; y < end; y++) {
        row.blend(maps, y);
        for (int64_t r = 0; r < grid->phases; r++)
            for (int64_t start = 0, count = row.pixels_of(r); start < count; start += TILE) {
                row.take(r, start);
                target.load(*grid, labels, weights, words, num_words, y, r, start, std::min<int64_t>(TILE, count - start),
                            std::max<int64_t>(num_classes, 1));
                (options->target_instead ? ecoc_tile<true> : ecoc_tile<false>)(row, target, num_bits, num_classes, *options, sums,
                                                                               gradient != nullptr);
                if (gradient) row.give_back(r, start);
            }
        if (gradient) row.spread(gradient, y);
    }
}

void cross_entropy(const Grid *grid, const float *maps, int64_t num_classes, const int64_t *labels, const float *weights,
                   int64_t first, int64_t end, double *sums, float *gradient) {
    Row row(*grid, num_classes, gradient != nullptr);
    TileTarget target(0);
    for (int64_t y = first; y < end; y++) {
        row.blend(maps, y);
        for (int64_t r = 0; r < grid->phases; r++)
            for (int64_t start = 0, count = row.pixels_of(r); start < count; start += TILE) {
                row.take(r, start);
                target.load(*grid, labels, weights, nullptr, 0, y, r, start, std::min<int64_t>(TILE, count - start), num_classes);
                cross_entropy_tile(row, target, num_classes, sums, gradient != nullptr);
                if (gradient) row.give_back(r, start);
            }
        if (gradient) row.spread(gradient, y);
    }
}

void one_hot_pseudo_label(const Grid *grid, const float *maps, int64_t num_classes, int64_t first, int64_t end,
                          int64_t *labels, float *confidence) {
    Row row(*grid, num_classes, false);
    float best[TILE], sum[TILE];
    int32_t label[TILE];
    for (int64_t y = first; y < end; y++) {
        row.blend(maps, y);
        for (int64_t r = 0; r < grid->phases; r++)
            for (int64_t start = 0, count = row.pixels_of(r); start < count; start += TILE) {
                row.take(r, start);
                const float *v = row.values.data();
                for (int i = 0; i < TILE; i++) best[i] = v[i], label[i] = 0, sum[i] = 0.f;
                for (int64_t n = 1; n < num_classes; n++)
                    for (int i = 0; i < TILE; i++) {
                        const bool better = v[n * TILE + i] > best[i];
                        label[i] = better ? (int32_t)n : label[i];
                        best[i] = better ? v[n * TILE + i] : best[i];
                    }
                for (int64_t n = 0; n < num_classes; n++)
                    for (int i = 0; i < TILE; i++) sum[i] += fast_exp(v[n * TILE + i] - best[i]);
                const int64_t at = y * grid->pixels_wide + r + start * grid->phases;
                for (int64_t i = 0; i < std::min<int64_t>(TILE, count - start); i++) {
                    labels[at + i * grid->phases] = label[i];
                    confidence[at + i * grid->phases] = 1.f / sum[i];
                }
            }
    }
}

// `form`: 0 hybrid, 1 code-wise, 2 bit-wise. `zeros`: zero bits of each codeword. Adds to counts [2] the bits corrected, and
// those that differ from the codeword's.
void ecoc_pseudo_label(const Grid *grid, const float *maps, int64_t num_bits, int64_t num_classes, const float *signs,
                       const float *zeros, const uint64_t *codewords, float reliability, int64_t limit, int64_t form,
                       int64_t first, int64_t end, int64_t *labels, float *confidence, float *reliable, uint64_t *words,
                       int64_t *counts) {
    const int64_t num_words = (num_bits + 63) / 64, plane = grid->pixels_high * grid->pixels_wide;
    Row row(*grid, num_bits, false);
    const int64_t padded = (num_classes + LANES - 1) / LANES * LANES;
    std::vector<float> scores(num_classes * TILE), surplus(num_bits * TILE), queue(padded, -INFINITY);
    std::vector<uint32_t> ones(2 * num_words * TILE), above(2 * num_words * TILE);
    std::vector<uint64_t> shared(num_words), hope(num_words);
    for (int64_t y = first; y < end; y++) {
        row.blend(maps, y);
        for (int64_t r = 0; r < grid->phases; r++)
            for (int64_t start = 0, count = row.pixels_of(r); start < count; start += TILE) {
                row.take(r, start);
                float sure_sum[TILE] = {}, surplus_sum[TILE] = {}, best[TILE];
                int32_t label[TILE] = {};
                std::fill(ones.begin(), ones.end(), 0);
                std::fill(above.begin(), above.end(), 0);
                for (int64_t k = 0; k < num_bits; k++) {
                    float *v = row.values.data() + k * TILE, *q = surplus.data() + k * TILE;
                    uint32_t *one = ones.data() + (k / 32) * TILE, *over = above.data() + (k / 32) * TILE;
                    const int bit = k % 32;
                    for (int i = 0; i < TILE; i++) {
                        const float e = fast_exp(-std::fabs(v[i])), sure = 1.f / (1.f + e);
                        const bool one_bit = !(v[i] < 0.f);
                        one[i] |= (uint32_t)one_bit << bit;
                        v[i] = one_bit ? sure : 1.f - sure;
                        sure_sum[i] += sure;
                        q[i] = sure - reliability;
                        surplus_sum[i] += q[i];
                        over[i] |= (uint32_t)(q[i] > 0.f) << bit;
                    }
                }
                for (int64_t n = 0; n < num_classes; n++) {
                    float s[TILE];
                    std::fill(s, s + TILE, zeros[n]);
                    for (int64_t k = 0; k < num_bits; k++) {
                        const float sign = signs[n * num_bits + k], *p = row.values.data() + k * TILE;
                        for (int i = 0; i < TILE; i++) s[i] += sign * p[i];
                    }
                    std::memcpy(scores.data() + n * TILE, s, sizeof(s));
                    for (int i = 0; i < TILE; i++) {
                        const bool better = n == 0 || s[i] > best[i];
                        label[i] = better ? (int32_t)n : label[i];
                        best[i] = better ? s[i] : best[i];
                    }
                }
                for (int64_t i = 0; i < std::min<int64_t>(TILE, count - start); i++) {
                    const int64_t at = y * grid->pixels_wide + r + (start + i) * grid->phases;
                    const float mean = sure_sum[i] / num_bits;
                    const bool whole = form == 1 || (form == 0 && mean > reliability);
                    if (!whole && form == 0) {
                        for (int64_t n = 0; n < num_classes; n++) queue[n] = scores[n * TILE + i];
                        for (int64_t x = 0; x < num_words; x++)
                            hope[x] = above[2 * x * TILE + i] | (uint64_t)above[(2 * x + 1) * TILE + i] << 32;
                        mine(surplus.data() + i, surplus_sum[i], hope.data(), num_bits, queue.data(), padded, label[i],
                             codewords, num_classes, num_words, limit, shared.data());
                    } else {
                        std::fill(shared.begin(), shared.end(), whole ? ~uint64_t(0) : 0);
                    }
                    int64_t kept = 0;
                    for (int64_t x = 0; x < num_words; x++) {
                        const uint64_t guess = ones[2 * x * TILE + i] | (uint64_t)ones[(2 * x + 1) * TILE + i] << 32;
                        const uint64_t differ = guess ^ codewords[x * num_classes + label[i]], changed = differ & shared[x];
                        words[x * plane + at] = guess ^ changed;
                        counts[0] += __builtin_popcountll(changed);
                        counts[1] += __builtin_popcountll(differ);
                        kept += __builtin_popcountll(shared[x]);
                    }
                    labels[at] = label[i];
                    confidence[at] = mean;
                    reliable[at] = whole ? 1.f : (float)kept / num_bits;
                }
            }
    }
}

}  // extern "C"
