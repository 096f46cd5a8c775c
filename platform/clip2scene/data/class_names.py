"""The classes of every data set: the names that they are prompted with, their raw label ids and their colours.

A class's key is its official name. The names to prompt with are ours: readable ("traffic cone", never "traffic_cone"),
of everyday speech, and a class may have several, whose embeddings are averaged. Colours are RGB, as the data set's own
tools draw the class.
"""

from __future__ import annotations

Classes = dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, int, int]]]
"""Class: names to prompt with, raw ids, colour. The order is that of the benchmark."""

NUSCENES: Classes = {
    "barrier": (("barrier", "traffic barrier"), (9,), (112, 128, 144)),
    "bicycle": (("bicycle",), (14,), (220, 20, 60)),
    "bus": (("bus",), (15, 16), (255, 127, 80)),
    "car": (("car",), (17,), (255, 158, 0)),
    "construction_vehicle": (("construction vehicle", "excavator"), (18,), (233, 150, 70)),
    "motorcycle": (("motorcycle",), (21,), (255, 61, 99)),
    "pedestrian": (("pedestrian", "person"), (2, 3, 4, 6), (0, 0, 230)),
    "traffic_cone": (("traffic cone",), (12,), (47, 79, 79)),
    "trailer": (("trailer",), (22,), (255, 140, 0)),
    "truck": (("truck",), (23,), (255, 99, 71)),
    "driveable_surface": (("road", "street"), (24,), (0, 207, 191)),
    "other_flat": (("traffic island", "rail track"), (25,), (175, 0, 75)),
    "sidewalk": (("sidewalk",), (26,), (75, 0, 75)),
    "terrain": (("grass", "terrain"), (27,), (112, 180, 60)),
    "manmade": (("building", "wall", "pole"), (28,), (222, 184, 135)),
    "vegetation": (("tree", "vegetation"), (30,), (0, 175, 0)),
}
"""nuScenes-lidarseg challenge: 16 classes of 32 raw categories; a raw id is the category's ``index``."""

NUSCENES_IGNORED = (0, 1, 5, 7, 8, 10, 11, 13, 19, 20, 29, 31)

SEMANTICKITTI: Classes = {
    "car": (("car",), (10, 252), (100, 150, 245)),
    "bicycle": (("bicycle",), (11,), (100, 230, 245)),
    "motorcycle": (("motorcycle",), (15,), (30, 60, 150)),
    "truck": (("truck",), (18, 258), (80, 30, 180)),
    "other_vehicle": (("bus", "train", "trailer"), (20, 13, 16, 256, 257, 259), (0, 0, 255)),
    "person": (("person", "pedestrian"), (30, 254), (255, 30, 30)),
    "bicyclist": (("bicyclist", "cyclist"), (31, 253), (255, 40, 200)),
    "motorcyclist": (("motorcyclist",), (32, 255), (150, 30, 90)),
    "road": (("road", "street"), (40, 60), (255, 0, 255)),
    "parking": (("parking lot", "parking space"), (44,), (255, 150, 255)),
    "sidewalk": (("sidewalk",), (48,), (75, 0, 75)),
    "other_ground": (("traffic island", "paved ground"), (49,), (175, 0, 75)),
    "building": (("building", "house"), (50,), (255, 200, 0)),
    "fence": (("fence",), (51,), (255, 120, 50)),
    "vegetation": (("vegetation", "tree", "bush"), (70,), (0, 175, 0)),
    "trunk": (("tree trunk",), (71,), (135, 60, 0)),
    "terrain": (("terrain", "grass"), (72,), (150, 240, 80)),
    "pole": (("pole",), (80,), (255, 240, 150)),
    "traffic_sign": (("traffic sign",), (81,), (255, 0, 0)),
}
"""SemanticKITTI, single scan: 19 classes; moving things (252 to 259) are of the class of standing ones, lane markings
of the road. The first raw id is the one that predictions are written with. Source: ``learning_map``,
``learning_map_inv`` and ``color_map`` (there BGR) of semantic-kitti.yaml."""

SEMANTICKITTI_IGNORED = (0, 1, 52, 99)
"""Unlabelled, outlier, other structure, other object."""

SCANNET: Classes = {
    "wall": (("wall",), (1,), (174, 199, 232)),
    "floor": (("floor",), (2,), (152, 223, 138)),
    "cabinet": (("cabinet",), (3,), (31, 119, 180)),
    "bed": (("bed",), (4,), (255, 187, 120)),
    "chair": (("chair",), (5,), (188, 189, 34)),
    "sofa": (("sofa", "couch"), (6,), (140, 86, 75)),
    "table": (("table",), (7,), (255, 152, 150)),
    "door": (("door",), (8,), (214, 39, 40)),
    "window": (("window",), (9,), (197, 176, 213)),
    "bookshelf": (("bookshelf",), (10,), (148, 103, 189)),
    "picture": (("picture", "painting"), (11,), (196, 156, 148)),
    "counter": (("counter",), (12,), (23, 190, 207)),
    "desk": (("desk",), (14,), (247, 182, 210)),
    "curtain": (("curtain",), (16,), (219, 219, 141)),
    "refrigerator": (("refrigerator", "fridge"), (24,), (255, 127, 14)),
    "shower_curtain": (("shower curtain",), (28,), (158, 218, 229)),
    "toilet": (("toilet",), (33,), (44, 160, 44)),
    "sink": (("sink",), (34,), (112, 128, 144)),
    "bathtub": (("bathtub",), (36,), (227, 119, 194)),
    "other_furniture": (("furniture",), (39,), (82, 84, 163)),
}
"""ScanNet benchmark: 20 classes of NYU's 40 ids; 0 and the other ids up to 40 are ignored."""

SCANNET_IGNORED = (0, 13, 15, 17, 18, 19, 20, 21, 22, 23, 25, 26, 27, 29, 30, 31, 32, 35, 37, 38, 40, 50, 149)
"""50 and 149 are no ids of NYU's. Three official label files hold them (scene0270_00, scene0270_02, scene0384_00), and
public preprocessing ignores them too."""

CITYSCAPES: Classes = {
    "road": (("road", "street"), (), (128, 64, 128)),
    "sidewalk": (("sidewalk",), (), (244, 35, 232)),
    "building": (("building",), (), (70, 70, 70)),
    "wall": (("wall",), (), (102, 102, 156)),
    "fence": (("fence",), (), (190, 153, 153)),
    "pole": (("pole",), (), (153, 153, 153)),
    "traffic_light": (("traffic light",), (), (250, 170, 30)),
    "traffic_sign": (("traffic sign",), (), (220, 220, 0)),
    "vegetation": (("vegetation", "tree"), (), (107, 142, 35)),
    "terrain": (("terrain", "grass"), (), (152, 251, 152)),
    "sky": (("sky",), (), (70, 130, 180)),
    "person": (("person", "pedestrian"), (), (220, 20, 60)),
    "rider": (("rider",), (), (255, 0, 0)),
    "car": (("car",), (), (0, 0, 142)),
    "truck": (("truck",), (), (0, 0, 70)),
    "bus": (("bus",), (), (0, 60, 100)),
    "train": (("train",), (), (0, 80, 100)),
    "motorcycle": (("motorcycle",), (), (0, 0, 230)),
    "bicycle": (("bicycle",), (), (119, 11, 32)),
}
"""Cityscapes: 19 classes of images, for prompts only."""
