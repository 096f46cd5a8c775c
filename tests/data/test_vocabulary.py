from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from clip2scene.config import digest_of
from clip2scene.data.vocabulary import IGNORE, UNKNOWN, VOCABULARIES, Vocabulary, vocabulary, vocabulary_of
from clip2scene.errors import ConfigError, DataError

EVERY = [pytest.param(words, id=name) for name, words in VOCABULARIES.items()]
SIZES = {"nuscenes": 16, "semantickitti": 19, "scannet": 20, "cityscapes": 19, "all": 28}


@pytest.mark.parametrize("words", EVERY)
def test_every_class_has_names_and_a_colour(words: Vocabulary) -> None:
    assert len(set(words.classes)) == len(words.classes) == len(words.prompts) == len(words.colours)
    assert len(words.classes) == SIZES[words.name]
    assert all(names for names in words.prompts)
    assert all(len(colour) == 3 and min(colour) >= 0 and max(colour) <= 255 for colour in words.colours)
    assert vocabulary(words.name) is words


@pytest.mark.parametrize("words", EVERY)
def test_prompts_are_readable_and_no_name_has_two_classes(words: Vocabulary) -> None:
    every = list(itertools.chain.from_iterable(words.prompts))
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", name) for name in every)
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("words", EVERY)
def test_every_class_has_a_raw_id_or_none_has(words: Vocabulary) -> None:
    labels = set(words.raw_to_label) - {UNKNOWN}
    assert labels in (set(), set(range(len(words.classes) + 1)))
    assert bool(labels) == (words.name in {"nuscenes", "semantickitti", "scannet"})


def test_nuscenes_is_what_scores_were_stored_with() -> None:
    assert vocabulary("nuscenes").digest == "b7ede93332af69fe"


def test_semantickitti_is_what_scores_were_stored_with() -> None:
    words = vocabulary("semantickitti")
    assert digest_of(words.classes, words.raw_to_label) == "f1f43a336557cc00"


def test_semantickitti_has_moving_things_in_the_classes_of_standing_ones() -> None:
    raw_to_label = vocabulary("semantickitti").raw_to_label
    standing = (10, 31, 30, 32, 16, 13, 18, 20)  # car, bicyclist, person, motorcyclist, on rails, bus, truck, other
    assert raw_to_label[252:] == tuple(raw_to_label[raw] for raw in standing)
    assert min(raw_to_label[252:]) > IGNORE


def test_scannet_takes_20_of_nyus_40_and_names_what_is_beyond() -> None:
    words = vocabulary("scannet")
    chosen = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39]
    labels = words.labels(np.array([*range(41), 50, 149], dtype=np.uint16), "labels.ply")
    assert labels[chosen].tolist() == list(range(1, 21))
    assert not np.delete(labels, chosen).any()
    with pytest.raises(DataError, match=r"labels.ply: label ids \[41, 1163\] .* 'scannet' \(allowed: 0 to 40, 50"):
        words.labels(np.array([5, 1163, 41, 41]), "labels.ply")
    with pytest.raises(DataError, match=r"label ids \[-1\]"):
        words.labels(np.array([-1, 3]), "labels.ply")


@pytest.mark.parametrize("name", ["cityscapes", "all"])
def test_words_for_prompts_only_refuse_labels(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\Aa.label: .*'{name}' is for prompts only; .*: nuscenes, semant[^\n]*\Z"):
        vocabulary(name).labels(np.zeros(3, np.uint8), "a.label")


def test_all_has_every_thing_once() -> None:
    words = vocabulary("all")
    names = dict(zip(words.classes, words.prompts, strict=True))
    assert names["person"] == ("person", "pedestrian")
    assert names["building"] == ("building", "house")
    assert {"sky", "traffic_cone", "trunk"} <= set(words.classes)
    assert "bathtub" not in words.classes  # of streets
    # Umbrella classes of single things that are there, or synonyms of one.
    assert not {"manmade", "other_vehicle", "pedestrian", "driveable_surface", "other_ground"} & set(words.classes)
    every = set(itertools.chain.from_iterable(words.prompts))
    for name in ("nuscenes", "semantickitti", "cityscapes"):
        for title, prompts in zip(vocabulary(name).classes, vocabulary(name).prompts, strict=True):
            assert every & set(prompts), title


def test_official_names_are_the_benchmarks_one_name_per_class() -> None:
    words = vocabulary("nuscenes", "official")
    assert ("driveable surface",) in words.prompts
    assert ("traffic cone",) in words.prompts
    assert (words.classes, words.raw_to_label) == (vocabulary("nuscenes").classes, vocabulary("nuscenes").raw_to_label)
    everything = vocabulary("all", "official")
    streets = [vocabulary(name, "official") for name in ("nuscenes", "semantickitti", "cityscapes")]
    assert {names for words in streets for names in words.prompts} == set(everything.prompts)
    assert vocabulary_of("scannet", "official").prompts[-1] == ("other furniture",)


def test_digests_tell_vocabularies_apart() -> None:
    every = [vocabulary(name, names) for name in VOCABULARIES for names in ("common", "official")]
    assert len({words.digest for words in every}) == len(every)


def test_vocabulary_of_a_data_set() -> None:
    names = {kind: vocabulary_of(kind).name for kind in ("streetworld", "nuscenes", "semantickitti", "scannet")}
    assert names == {kind: kind for kind in names} | {"streetworld": "nuscenes"}
    with pytest.raises(
        ConfigError, match=r"'cityscapes': unknown; allowed: streetworld, nuscenes, semantickitti, scann"
    ):
        vocabulary_of("cityscapes")
    with pytest.raises(ConfigError, match=r"prompts.vocabulary='latin': unknown; allowed: nuscenes, semantickitti"):
        vocabulary("latin")
