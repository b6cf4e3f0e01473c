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
constexpr int FACTORS = 64;          // numbers from 1 to 2 whose product is far from the largest float
constexpr float COSINE_EPS = 1e-3f;  // as losses.COSINE_EPS
constexpr float SAFE_EXPONENT = 60.f;
constexpr int NUM_BINS = 15, CONFIDENCE_UNIT = NUM_BINS * 1024;  // as in metrics.py

constexpr int LANES = 8;              // pixels of a vector
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
constexpr uint32_t SIGN = 0x80000000u;

inline Floats load(const float *from) { Floats x; std::memcpy(&x, from, sizeof(x)); return x; }
inline Ints load(const int32_t *from) { Ints x; std::memcpy(&x, from, sizeof(x)); return x; }
inline Words load(const uint32_t *from) { Words x; std::memcpy(&x, from, sizeof(x)); return x; }
inline void store(float *to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
inline Floats magnitude(Floats x) { return (Floats)((Words)x & ~SIGN); }
inline Floats root(Floats x) { Floats y; for (int i = 0; i < LANES; i++) y[i] = std::sqrt(x[i]); return y; }

// exp of each lane, for numbers up to 88: 2^n by the exponent's bits, times a polynomial of the rest (minimax; 2e-7 relative).
inline Floats fast_exp(Floats x) {
    const Floats least = Floats{} - 86.f;
    x = least > x ? least : x;  // NaN stays NaN
    const float log2_e = 1.44269504f, magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const Floats shifted = x * log2_e + magic;
    const Floats rest = x * log2_e - (shifted - magic);  // from -1/2 to 1/2
    Floats p = rest * 1.3264727e-3f + 9.6715128e-3f;
    p = p * rest + 5.5507337e-2f;
    p = p * rest + 2.4022242e-1f;
    p = p * rest + 6.9314698e-1f;
    p = p * rest + 1.f;
    return p * (Floats)(((Words)shifted - 0x4B400000u + 127u) << 23);
}

constexpr int GROUP = 4;

// Reciprocals of GROUP numbers from 1 to 2 by one division, which takes as long as ten products. Returns their product.
inline Floats reciprocals(const Floats *number, Floats *reciprocal) {
    const Floats front = number[0] * number[1], back = number[2] * number[3], product = front * back, rest = 1.f / product;
    const Floats per_front = rest * back, per_back = rest * front;
    reciprocal[0] = per_front * number[1];
    reciprocal[1] = per_front * number[0];
    reciprocal[2] = per_back * number[3];
    reciprocal[3] = per_back * number[2];
    return product;
}

// log of positive, normal numbers by range reduction and Cephes' polynomial (S. Moshier), 1e-7 relative.
inline Floats fast_log(Floats x) {
    const Words bits = (Words)x - 0x3F3504F3u;  // mantissa in [sqrt(1/2), sqrt(2))
    const Floats e = __builtin_convertvector((Ints)bits >> 23, Floats);
    const Floats m = (Floats)((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.f;
    const Floats z = m * m;
    Floats p = m * 7.0376836292e-2f - 1.1514610310e-1f;
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

    // Where the cells of a phase's pixels begin in the first blended map.
    const float *cells(int64_t phase, int64_t first) const { return blended.data() + EDGE + g.phase_cell[phase] + first; }

    void take(int64_t phase, int64_t first) {
        const float share = g.phase_share[phase];
        for (int64_t c = 0; c < maps; c++) {
            const float *from = cells(phase, first) + c * stride;
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
            to[0] += from[0] * (1.f - share);
            for (int i = 1; i < TILE; i++) to[i] += from[i] * (1.f - share) + from[i - 1] * share;
            to[TILE] += from[TILE - 1] * share;
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

inline Floats with_sign(Floats value, Words zeros) {  // -value where the target's bit, the lowest one here, is 0
    return (Floats)((Words)value ^ (zeros << 31));
}

inline Floats with_sign_of(Floats size, Floats sign) { return (Floats)((Words)size | ((Words)sign & SIGN)); }

inline double total(Floats x) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// Loss of LANES pixels of a tile, from `at`, as ecocseg.losses.ecoc_loss has it: adds to sums [3], writes the gradient of all
// maps. INSTEAD: the target stands in for its class's codeword among the negatives.
template <bool INSTEAD, bool GRADIENT>
void ecoc_pixels(Row &row, const TileTarget &target, int64_t num_bits, int64_t num_classes, const LossOptions &o, double *sums,
                 int64_t at) {
    const float *values = row.values.data() + at, *products = values + num_bits * TILE;
    float *gradient = row.gradient.data() + at, *exponentials = gradient + num_bits * TILE;
    const uint32_t *zeros = target.zeros.data() + at;
    const Floats w = load(target.weight + at), one = Floats{} + 1.f;
    Floats size = {}, square = {}, dot = {}, doubts = one, log_sure = {};
    for (int64_t k = 0; k < num_bits; k += GROUP) {
        const int64_t count = std::min<int64_t>(GROUP, num_bits - k);
        Floats doubt[GROUP] = {one, one, one, one}, sure[GROUP];  // sure: max(p, 1 - p)
        Words zero = load(zeros + k / 32 * TILE) >> k % 32;
        for (int64_t j = 0; j < count; j++, zero >>= 1) {
            const Floats v = load(values + (k + j) * TILE), a = magnitude(v);
            size += a;
            square += a * a;
            dot += with_sign(v, zero);
            doubt[j] = 1.f + fast_exp(-a);
        }
        doubts *= reciprocals(doubt, sure);
        for (int64_t j = 0; GRADIENT && j < count; j++)
            store(gradient + (k + j) * TILE, with_sign_of(sure[j] - 0.5f, load(values + (k + j) * TILE)));
        if ((k + GROUP) % FACTORS == 0 || k + GROUP >= num_bits) log_sure -= fast_log(doubts), doubts = one;
    }
    const Floats norm = root(square), inverse = 1.f / (norm > COSINE_EPS ? norm : Floats{} + COSINE_EPS);
    const Floats scale = inverse / std::sqrt((float)num_bits), cosine = dot * scale;
    sums[0] += total((0.5f * (size - dot) - log_sure) * w / (float)num_bits);
    sums[1] += total((1.f - cosine) * w);
    Floats slope = Floats{} - o.distance, radial = {};
    if (o.contrast != 0.f) {
        const Ints label = load(target.label + at);
        const Floats per_scale = scale * o.sharpness, own = cosine * o.sharpness;
        auto exponent = [&](int64_t n) {
            const Floats x = load(products + n * TILE) * per_scale;
            return INSTEAD ? (label == (int32_t)n ? own : x) : x;
        };
        Floats top = {}, sum = {};
        if (o.sharpness > SAFE_EXPONENT) {
            top -= o.sharpness;
            for (int64_t n = 0; n < num_classes; n++) top = exponent(n) > top ? exponent(n) : top;
        }
        for (int64_t n = 0; n < num_classes; n++) {
            const Floats e = fast_exp(exponent(n) - top);
            store(exponentials + n * TILE, e);
            sum += e;
        }
        const Floats per_sum = o.contrast * o.sharpness / sum;
        sums[2] += total((fast_log(sum) + top - own) * w);
        slope -= o.contrast * o.sharpness;
        if (INSTEAD) slope += fast_exp(own - top) * per_sum;
        for (int64_t n = 0; GRADIENT && n < num_classes; n++) {
            Floats s = load(exponentials + n * TILE) * (w * scale * per_sum);
            if (INSTEAD) s = label == (int32_t)n ? Floats{} : s;
            store(exponentials + n * TILE, s);
            radial += load(products + n * TILE) * s;
        }
    }
    if (!GRADIENT) return;
    const Floats to_target = slope * w * scale, pull = w * (o.bce / num_bits), sign_slope = to_target - 0.5f * pull;
    radial = norm > COSINE_EPS ? (radial + to_target * dot) * inverse * inverse : Floats{};
    Words zero = {};
    for (int64_t k = 0; k < num_bits; k++, zero >>= 1) {
        if (k % 32 == 0) zero = load(zeros + k / 32 * TILE);
        const Floats half = load(gradient + k * TILE), v = load(values + k * TILE);
        store(gradient + k * TILE, half * pull - v * radial + with_sign(sign_slope, zero));
    }
}

template <bool GRADIENT>
void cross_entropy_pixels(Row &row, const TileTarget &target, int64_t num_classes, double *sums, int64_t at) {
    const float *values = row.values.data() + at;
    float *gradient = row.gradient.data() + at;
    const Floats w = load(target.weight + at);
    const Ints label = load(target.label + at);
    Floats top = load(values), sum = {}, own = {};
    for (int64_t n = 0; n < num_classes; n++) {
        const Floats v = load(values + n * TILE);
        top = v > top ? v : top;
        own = label == (int32_t)n ? v : own;
    }
    for (int64_t n = 0; n < num_classes; n++) {
        const Floats e = fast_exp(load(values + n * TILE) - top);
        if (GRADIENT) store(gradient + n * TILE, e);
        sum += e;
    }
    sums[0] += total((fast_log(sum) + top - own) * w);
    const Floats per_sum = w / sum;
    for (int64_t n = 0; GRADIENT && n < num_classes; n++) {
        const Floats slope = load(gradient + n * TILE) * per_sum;
        store(gradient + n * TILE, label == (int32_t)n ? slope - w : slope);
    }
}

// ---- classes, pseudo-labels and counts, LANES pixels at a time ---------------------------------------------------------

inline bool any(Ints mask) { int32_t found = 0; for (int i = 0; i < LANES; i++) found |= mask[i]; return found; }

// Calls task(cells, share, at, count) for every chunk: where its cells begin in the first blended map, the share of the next
// cell, its first pixel's place in the image, and how many of the LANES are pixels. Its pixels are `phases` apart.
template <typename Task> void each_chunk(Row &row, const float *maps, int64_t first, int64_t end, Task task) {
    for (int64_t y = first; y < end; y++) {
        row.blend(maps, y);
        for (int64_t start = 0; start < row.pixels_of(0); start += LANES)
            for (int64_t r = 0; r < row.g.phases; r++) {
                const int64_t count = std::min<int64_t>(LANES, row.pixels_of(r) - start);
                const int64_t at = y * row.g.pixels_wide + r + start * row.g.phases;
                if (count > 0) task(row.cells(r, start), row.g.phase_share[r], at, count);
            }
    }
}

inline void calibrate(int64_t *bins, float confidence, bool right) {
    const auto level = confidence == confidence ? (int64_t)std::nearbyint(confidence * CONFIDENCE_UNIT) : 0;
    int64_t *bin = bins + 3 * (std::max<int64_t>(level - 1, 0) / (CONFIDENCE_UNIT / NUM_BINS));
    bin[0]++;
    bin[1] += right;
    bin[2] += level;
}

// Classes of LANES pixels and their softmax probability.
struct Softmax {
    std::vector<Floats> value;  // [N]
    Floats confidence;
    Ints label;

    explicit Softmax(int64_t num_classes) : value(num_classes) {}

    void look(const float *cells, int64_t stride, float share) {
        Floats best, sum = {};
        label = Ints{};
        for (size_t n = 0; n < value.size(); n++) {
            const Floats a = load(cells + n * stride);
            value[n] = a + share * (load(cells + n * stride + 1) - a);
            const Ints better = n ? value[n] > best : Ints{} - 1;
            label = better ? Ints{} + (int32_t)n : label;
            best = better ? value[n] : best;
        }
        for (const Floats &v : value) sum += fast_exp(v - best);
        confidence = 1.f / sum;
    }
};

constexpr int NIBBLE = 4, SUMS = 1 << NIBBLE;

// Classes and bits of LANES pixels. Bits are 32 a word here, the lower half of a 64-bit word first.
struct Bits {
    const int64_t num_bits, num_classes, halves;
    const uint64_t *codewords;      // [X, N]
    std::vector<uint32_t> places;   // [N, K / NIBBLE]: where in `sums` those of the codewords' bits are, in bytes
    std::vector<Floats> value;      // [K and some zeros]: p - 1/2
    std::vector<Floats> sums;       // [K / NIBBLE, SUMS]: of the values of the bits set in each pattern
    std::vector<Floats> score;      // [N]: sum of the values of the codeword's ones; (K - distance) / 2, but for what all share
    std::vector<Words> ones, hope, shared;  // [2 X]: p >= 1/2; bits surer than the threshold; bits taken from the codeword
    Floats sure_sum;                // sum over bits of |p - 1/2|
    Ints label = {};
    int64_t least_distance, nearest = 0;  // nearest: the class of the last pixel, often the next one's too

    Bits(int64_t num_bits, int64_t num_classes, const uint64_t *codewords)
        : num_bits(num_bits), num_classes(num_classes), halves((num_bits + 63) / 64 * 2), codewords(codewords),
          value((num_bits + NIBBLE - 1) / NIBBLE * NIBBLE), sums(value.size() / NIBBLE * SUMS), score(num_classes),
          ones(halves), hope(halves), shared(halves), least_distance(num_bits) {
        for (int64_t n = 0; n < num_classes; n++)
            for (int64_t k = 0; k < num_bits; k += NIBBLE)
                places.push_back(sizeof(Floats) * (k / NIBBLE * SUMS + (codewords[k / 64 * num_classes + n] >> k % 64) % SUMS));
        for (int64_t n = 0; n < num_classes; n++)
            for (int64_t m = 0; m < n; m++) {
                int64_t distance = 0;
                for (int64_t x = 0; x < halves / 2; x++)
                    distance += __builtin_popcountll(codewords[x * num_classes + n] ^ codewords[x * num_classes + m]);
                least_distance = std::min(least_distance, distance);
            }
    }

    uint32_t all_bits(int64_t x) const {  // those of a half word that the code has
        const int64_t bits = num_bits - 32 * x;
        return bits >= 32 ? ~0u : bits > 0 ? (1u << bits) - 1 : 0u;
    }

    // A half word whose bits entered at the top, the first of them first, each moving down as others followed.
    Words in_place(Words entered, int64_t x) const {
        const int64_t bits = num_bits - 32 * x;
        return bits >= 32 ? entered : bits > 0 ? entered >> (32 - bits) : Words{};
    }

    uint64_t word(const std::vector<Words> &bits, int64_t x, int lane) const {
        return bits[2 * x][lane] | (uint64_t)bits[2 * x + 1][lane] << 32;
    }

    // Probabilities of the bits of pixels between these cells of each map and the next.
    void look(const float *cells, int64_t stride, float share) {
        const Floats one = Floats{} + 1.f;
        Floats sum = {};
        for (int64_t x = 0; x < halves; x++) {
            Words above = {};
            const int64_t end = std::min(32 * (x + 1), num_bits);
            for (int64_t k = 32 * x; k < end; k += GROUP) {
                const int64_t count = std::min<int64_t>(GROUP, end - k);
                Floats logit[GROUP], doubt[GROUP] = {one, one, one, one}, sure[GROUP];
                for (int64_t j = 0; j < count; j++) {
                    const float *at = cells + (k + j) * stride;
                    logit[j] = load(at) + share * (load(at + 1) - load(at));
                    doubt[j] = 1.f + fast_exp(-magnitude(logit[j]));
                    above = above >> 1 | (~(Words)(logit[j] < 0.f) & SIGN);
                }
                reciprocals(doubt, sure);
                for (int64_t j = 0; j < count; j++) {
                    sum += sure[j] - 0.5f;
                    value[k + j] = with_sign_of(sure[j] - 0.5f, logit[j]);
                }
            }
            ones[x] = in_place(above, x);
        }
        sure_sum = sum;
    }

    // Whether a class is nearest for certain, by its differing bits alone. With d = least_distance, e of the K bits differ from
    // the class's codeword, so at least d - e from any other. A bit that differs costs at most 1, and all K cost at least
    // K - unsure together, so the class costs at most e and another at least d - e - unsure.
    bool is_nearest(int64_t n, int lane) const {
        const float unsure = num_bits - 2.f * sure_sum[lane];
        int64_t differing = 0;
        for (int64_t x = 0; x < halves / 2; x++)
            differing += __builtin_popcountll(word(ones, x, lane) ^ codewords[x * num_classes + n]);
        return 2.f * differing + unsure < least_distance - 0.01f;  // far more than what sums are rounded by
    }

    // Classes of the first `count` pixels; scores are computed where they are wanted or needed.
    void classify(int64_t count, bool with_scores) {
        bool certain = !with_scores;
        for (int64_t i = 0; certain && i < count; i++) certain = is_nearest(nearest, i);
        if (certain) {
            label = Ints{} + (int32_t)nearest;
        } else {
            decode();
            nearest = label[count - 1];
        }
    }

    // Scores of all classes, and the largest. A class's score is a sum over NIBBLE bits at a time, of which all sums are made
    // first: 11 additions for 4 bits, and each class needs one more, where it would need 4 multiplications.
    void decode() {
        const int64_t nibbles = value.size() / NIBBLE;
        for (int64_t i = 0; i < nibbles; i++) {
            Floats *sum = sums.data() + i * SUMS;
            const Floats *bit = value.data() + i * NIBBLE;
            for (int j = 0; j < NIBBLE; j++)
                for (int p = 0; p < 1 << j; p++) sum[p + (1 << j)] = sum[p] + bit[j];
        }
        for (int64_t n = 0; n < num_classes; n++) {
            const uint32_t *of_class = places.data() + n * nibbles;
            Floats total = {};
            for (int64_t i = 0; i < nibbles; i++) total += load((const float *)((const char *)sums.data() + of_class[i]));
            score[n] = total;
        }
        label = first_largest(Ints{} - 1);
    }

    // The class of the largest score, and from now on without these classes.
    Ints first_largest(Ints without) {
        Floats best = Floats{} - INFINITY;
        Ints place = {};
        for (int64_t n = 0; n < num_classes; n++) {
            score[n] = without == (int32_t)n ? Floats{} - INFINITY : score[n];
            const Ints better = score[n] > best;
            place = better ? Ints{} + (int32_t)n : place;
            best = better ? score[n] : best;
        }
        return place;
    }

    // Reliable bits of the open pixels, as ecocseg.bits.reliable_words has it. Overwrites values and scores.
    void mine(Ints open, float reliability, int64_t limit) {
        std::vector<Words> &still = agreed;
        for (int64_t x = 0; x < halves; x++) {
            const int64_t end = std::min(32 * (x + 1), num_bits);
            Words surer = {};
            for (int64_t k = 32 * x; k < end; k++) {
                value[k] = magnitude(value[k]) - (reliability - 0.5f);  // surplus
                surer = surer >> 1 | ((Words)(value[k] > 0.f) & SIGN);
            }
            hope[x] = in_place(surer, x);
            still[x] = Words{} + all_bits(x);
        }
        Ints next = label;
        for (int64_t candidates = 2; candidates <= limit; candidates++) {
            Words hopeful = {};
            for (int64_t x = 0; x < halves; x++) hopeful |= still[x] & hope[x];
            open &= (Ints)(hopeful != 0u);
            if (!any(open)) return;
            next = first_largest(next);
            Floats sum[GROUP] = {};  // of the surplus, in parts: additions one after another would be waited for
            hopeful = Words{};
            for (int64_t x = 0; x < halves; x++) {
                still[x] &= ~differing(next, x);
                hopeful |= still[x] & hope[x];
                Words kept = still[x];
                for (int64_t k = 32 * x; k < std::min(32 * (x + 1), (int64_t)value.size()); k += GROUP, kept >>= GROUP)
                    for (int j = 0; j < GROUP; j++)
                        sum[j] += (Floats)((Words)value[k + j] & (Words)((Ints)(kept << (31 - j)) >> 31));
            }
            const Floats surplus = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            const Ints settled = open & (surplus > 0.f) & (Ints)(hopeful != 0u);
            for (int64_t x = 0; x < halves; x++) shared[x] |= still[x] & (Words)settled;
            open &= ~settled;
        }
    }

    // Bits of a half word in which the codewords of these classes differ from the labels'.
    Words differing(Ints classes, int64_t x) const {
        const uint64_t *codes = codewords + x / 2 * num_classes;
        uint32_t found[LANES];
        for (int i = 0; i < LANES; i++) found[i] = (uint32_t)((codes[classes[i]] ^ codes[label[i]]) >> 32 * (x % 2));
        return load(found);
    }

    std::vector<Words> agreed = std::vector<Words>(halves);  // while mining: bits on which all candidates agree
};

}  // namespace

extern "C" {

// Rows [first, end) of one image. Adds the three terms, each summed over pixels, to `sums`, and the gradient of their weighted
// sum to that of the maps where it is wanted. The last maps are products only if `contrast` is not 0.
void ecoc_loss(const Grid *grid, const float *maps, int64_t num_bits, int64_t num_classes, const int64_t *labels,
               const float *weights, const uint64_t *words, const LossOptions *options, int64_t first, int64_t end,
               double *sums, float *gradient) {
    const int64_t num_words = (num_bits + 63) / 64;
    const auto pixels = options->target_instead ? (gradient ? ecoc_pixels<true, true> : ecoc_pixels<true, false>)
                                                : (gradient ? ecoc_pixels<false, true> : ecoc_pixels<false, false>);
    Row row(*grid, num_bits + num_classes, true);
    TileTarget target(num_words);
    for (int64_t y = first; y < end; y++) {
        row.blend(maps, y);
        for (int64_t r = 0; r < grid->phases; r++)
            for (int64_t start = 0, count = row.pixels_of(r); start < count; start += TILE) {
                row.take(r, start);
                target.load(*grid, labels, weights, words, num_words, y, r, start, std::min<int64_t>(TILE, count - start),
                            std::max<int64_t>(num_classes, 1));
                for (int64_t at = 0; at < TILE; at += LANES)
                    pixels(row, target, num_bits, num_classes, *options, sums, at);
                if (gradient) row.give_back(r, start);
            }
        if (gradient) row.spread(gradient, y);
    }
}

void cross_entropy(const Grid *grid, const float *maps, int64_t num_classes, const int64_t *labels, const float *weights,
                   int64_t first, int64_t end, double *sums, float *gradient) {
    const auto pixels = gradient ? cross_entropy_pixels<true> : cross_entropy_pixels<false>;
    Row row(*grid, num_classes, gradient != nullptr);
    TileTarget target(0);
    for (int64_t y = first; y < end; y++) {
        row.blend(maps, y);
        for (int64_t r = 0; r < grid->phases; r++)
            for (int64_t start = 0, count = row.pixels_of(r); start < count; start += TILE) {
                row.take(r, start);
                target.load(*grid, labels, weights, nullptr, 0, y, r, start, std::min<int64_t>(TILE, count - start), num_classes);
                for (int64_t at = 0; at < TILE; at += LANES) pixels(row, target, num_classes, sums, at);
                if (gradient) row.give_back(r, start);
            }
        if (gradient) row.spread(gradient, y);
    }
}

void one_hot_pseudo_label(const Grid *grid, const float *maps, int64_t num_classes, int64_t first, int64_t end,
                          int64_t *labels, float *confidence) {
    Row row(*grid, num_classes, false);
    Softmax softmax(num_classes);
    each_chunk(row, maps, first, end, [&](const float *cells, float share, int64_t at, int64_t count) {
        softmax.look(cells, row.stride, share);
        for (int64_t i = 0; i < count; i++, at += grid->phases) {
            labels[at] = softmax.label[i];
            confidence[at] = softmax.confidence[i];
        }
    });
}

// `form`: 0 hybrid, 1 code-wise, 2 bit-wise. Adds to counts [2] the bits corrected, and those that differ from the codeword's.
void ecoc_pseudo_label(const Grid *grid, const float *maps, int64_t num_bits, int64_t num_classes,
                       const uint64_t *codewords, float reliability, int64_t limit, int64_t form, int64_t first, int64_t end,
                       int64_t *labels, float *confidence, float *reliable, uint64_t *words, int64_t *counts) {
    const int64_t plane = grid->pixels_high * grid->pixels_wide;
    Row row(*grid, num_bits, false);
    Bits bits(num_bits, num_classes, codewords);
    each_chunk(row, maps, first, end, [&](const float *cells, float share, int64_t at, int64_t count) {
        bits.look(cells, row.stride, share);
        const Floats mean = 0.5f + bits.sure_sum / (float)num_bits;
        Ints whole = form == 0 ? Ints(mean > reliability) : Ints{} - (form == 1), open = {};
        if (form == 0)
            for (int64_t i = 0; i < count; i++) open[i] = ~whole[i];
        bits.classify(count, any(open));
        std::fill(bits.shared.begin(), bits.shared.end(), (Words)whole);
        if (any(open)) bits.mine(open, reliability, limit);
        for (int64_t i = 0; i < count; i++, at += grid->phases) {
            const int64_t label = bits.label[i];
            int64_t kept = 0;
            for (int64_t x = 0; x < bits.halves / 2; x++) {
                const uint64_t guess = bits.word(bits.ones, x, i), shared = bits.word(bits.shared, x, i);
                const uint64_t differ = guess ^ codewords[x * num_classes + label], changed = differ & shared;
                words[x * plane + at] = guess ^ changed;
                counts[0] += __builtin_popcountll(changed);
                counts[1] += __builtin_popcountll(differ);
                kept += __builtin_popcountll(shared);
            }
            labels[at] = label;
            confidence[at] = mean[i];
            reliable[at] = whole[i] ? 1.f : (float)kept / num_bits;
        }
    });
}

// Classes of pixels, and calibration as ecocseg.metrics.calibration_counts has it, added to bins [15, 3].
void one_hot_count(const Grid *grid, const float *maps, int64_t num_classes, const int64_t *labels, int64_t first, int64_t end,
                   int64_t *classes, int64_t *bins) {
    Row row(*grid, num_classes, false);
    Softmax softmax(num_classes);
    each_chunk(row, maps, first, end, [&](const float *cells, float share, int64_t at, int64_t count) {
        softmax.look(cells, row.stride, share);
        for (int64_t i = 0; i < count; i++, at += grid->phases) {
            classes[at] = softmax.label[i];
            if (labels[at] != IGNORE) calibrate(bins, softmax.confidence[i], classes[at] == labels[at]);
        }
    });
}

void ecoc_count(const Grid *grid, const float *maps, int64_t num_bits, int64_t num_classes,
                const uint64_t *codewords, const int64_t *labels, int64_t first, int64_t end, int64_t *classes, int64_t *bins) {
    Row row(*grid, num_bits, false);
    Bits bits(num_bits, num_classes, codewords);
    each_chunk(row, maps, first, end, [&](const float *cells, float share, int64_t at, int64_t count) {
        bits.look(cells, row.stride, share);
        bits.classify(count, false);
        for (int64_t i = 0; i < count; i++, at += grid->phases) {
            classes[at] = bits.label[i];
            if (labels[at] == IGNORE) continue;
            for (int64_t x = 0; x < bits.halves / 2; x++) {
                const uint64_t wrong = bits.word(bits.ones, x, i) ^ codewords[x * num_classes + labels[at]];
                for (int64_t k = 64 * x; k < std::min(64 * (x + 1), num_bits); k++)
                    calibrate(bins, 0.5f + std::fabs(bits.value[k][i]), !(wrong >> (k % 64) & 1));
            }
        }
    });
}

}  // extern "C"
