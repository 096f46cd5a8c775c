"""Job files: overrides, digests and messages; and what ``clip2scene settings`` lists."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from clip2scene.cli import main
from clip2scene.config import STAGES, Job
from clip2scene.errors import ConfigError, last_line, one_line
from clip2scene.jobfile import load_job
from clip2scene.sweeps.space import Space
from clip2scene.tables.spec import Table, load_table
from commands import REPOSITORY

JOBS = REPOSITORY / "jobs"
PLAIN = [path for path in sorted(JOBS.glob("*.yaml")) if not path.stem.startswith("table")]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.name)
def test_every_job_file_is_valid(path):
    overrides = ["dataset.root=/data"] if path.stem in ("nuscenes", "semantickitti", "scannet") else []
    assert load_job(path, overrides).name


@pytest.mark.parametrize(
    ("error", "one", "last"),
    [
        (RuntimeError("first\n  second \n\n"), "first second", "second"),
        (OSError(), "", "OSError"),  # some have no text
    ],
)
def test_an_error_is_part_of_a_sentence(error, one, last):
    assert (one_line(error), one_line(error, 5), last_line(error)) == (one, one[:5], last)


def test_overrides_reach_every_level():
    job = load_job(JOBS / "demo.yaml", ["seed=3", "distill.stcr.lambda=0.25", "student.channels=[8, 16]"])
    assert (job.seed, job.distill.stcr.lambda_, job.student.channels) == (3, 0.25, (8, 16))


def test_digest_follows_values_only():
    plain, same = load_job(JOBS / "demo.yaml"), load_job(JOBS / "demo.yaml", ["seed=0"])
    assert plain.digest() == same.digest()
    assert plain.digest() != load_job(JOBS / "demo.yaml", ["seed=1"]).digest()


def test_the_released_variant_sets_every_switch_that_is_not_given():
    plain, released = (load_job(JOBS / "demo.yaml", [f"variant={name}"]) for name in ("paper", "released"))
    assert plain.digest() == load_job(JOBS / "demo.yaml").digest()
    assert not released.teacher.clip_normalisation
    assert (released.student.use_position, released.student.use_intensity) == (False, True)
    stcr = released.distill.stcr
    assert (stcr.grid, stcr.pixel_term, stcr.cell_text) == ("voxel", False, "first")
    assert (stcr.max_points_per_cell, stcr.count_empty_slots) == (8, True)
    assert released.distill.scr.form == "cross_entropy"
    assert not released.distill.normalise_features
    s3 = released.distill.s3  # probability is set in the job
    assert (s3.start_epoch, s3.granularity, s3.synchronised, s3.probability) == (11, "batch", False, 0.2)
    assert released.distill.sweep_choice == "random"
    assert load_job(JOBS / "demo.yaml", ["variant=released", "distill.stcr.pixel_term=true"]).distill.stcr.pixel_term
    rooms = load_job(JOBS / "scannet.yaml", ["dataset.root=/data/scannet", "variant=released"]).distill
    assert (rooms.s3.start_epoch, rooms.s3.granularity, rooms.stcr.grid) == (10, "batch", "voxel")


def test_the_shipped_clip_is_read_as_it_was_trained_in_both_variants():
    plain, released = (load_job(JOBS / "streetworld.yaml", [f"variant={name}"]) for name in ("paper", "released"))
    assert plain.teacher == released.teacher
    assert plain.student != released.student


def test_a_job_is_based_on_another_and_its_own_settings_win(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/far.yaml").write_text(f"{{base: {JOBS / 'demo.yaml'}, student: {{channels: [8, 16, 32]}}}}")
    (tmp_path / "near.yaml").write_text("{base: deep/far.yaml, name: near, student: {voxel_size_m: 1.0}}")
    demo, job = load_job(JOBS / "demo.yaml"), load_job(tmp_path / "near.yaml", ["seed=3"])
    student = demo.student.model_copy(update={"channels": (8, 16, 32), "voxel_size_m": 1.0})
    assert job == demo.model_copy(update={"name": "near", "seed": 3, "student": student})


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("circle.yaml", r"job\.yaml: base=circle\.yaml: base=job\.yaml: this file is based on itself$"),
        ("nowhere.yaml", r"job\.yaml: base=nowhere\.yaml: .*nowhere\.yaml: cannot read the job file \(No such file"),
        ("empty.yaml", r"job\.yaml: base=empty\.yaml: .* is a mapping of keys to values, but this is empty$"),
        ("typo.yaml", r"job\.yaml: base=typo\.yaml: distil: unknown key; .* did you mean distill\?$"),
        ("wrong.yaml", r"job\.yaml: base=wrong\.yaml: distill\.epochs=-1: input should be greater than"),
        ("link.yaml", r"job\.yaml: base=link\.yaml: "),
        (str(JOBS / "table3_ablation.yaml"), r"job\.yaml: base=.*: a table, but a job is needed$"),
        ('"\\0"', r"job\.yaml: base="),
        ("[a, b]", r"job\.yaml: base=\['a', 'b'\]: the path of a job file is needed$"),
    ],
)
def test_an_invalid_base_is_one_sentence(tmp_path, base, sentence):
    (tmp_path / "job.yaml").write_text(f"base: {base}\n")
    for name, text in {
        "circle": "base: job.yaml",
        "empty": "",
        "typo": "distil: {}",
        "wrong": "distill: {epochs: -1}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "link.yaml").symlink_to("link.yaml")
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_job(tmp_path / "job.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "distill: {epochs: 3}\nseed: 1\ndistill: {batch_size: 4}\n",
            "the key 'distill' is given twice, again in line 3",
        ),
        ("distill:\n  epochs: 3\n  epochs: 4\n", "the key 'epochs' is given twice, again in line 3"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path, text, sentence):
    (tmp_path / "job.yaml").write_text(text + f"base: {JOBS / 'demo.yaml'}\n")
    with pytest.raises(ConfigError, match=sentence):
        load_job(tmp_path / "job.yaml")


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_job(JOBS / "demo.yaml").seed = 4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "distill.scr.tauu=3",
            r"distill\.scr\.tauu: unknown key; allowed here: form, tau, weight; did you mean distill\.scr\.tau\?$",
        ),
        ("distil.epochs=3", r"distil: unknown key; allowed here: .*variant; did you mean distill\?$"),
        ("epochs=3", r"epochs: unknown key; .*; did you mean distill\.epochs or finetune\.epochs\?$"),
        ("finetune.label_fraction=0.7", r"label_fraction=0\.7: every n-th is used, .* such as 0\.5 or 1$"),
        (
            "resources.gpus_per_worker=2",
            r"resources\.gpus_per_worker=2: input should be less than or equal to 1",
        ),
        (
            "resources={num_workers: 0, gpus_per_worker: 1}",
            r"resources\.gpus_per_worker=1 needs resources\.num_workers above 0",
        ),
        ("student.use_colour=true", r"points of streetworld have no colour; allowed: dataset\.kind=scannet$"),
        ("distill.colour=red", r"distill\.colour: unknown key; .*, sweep_window_s$"),
        ("distill.scr.tau=-1", r"distill\.scr\.tau=-1: input should be greater than 0"),
        ("distill.scr.tau=warm", r"distill\.scr\.tau='warm': .*valid number"),
        ("distill.scr.tau=.nan", r"distill\.scr\.tau=nan: .*finite"),
        ("seed=1.5", r"seed=1\.5: .*valid integer"),
        (
            "dataset.kind=waymo",
            r"dataset\.kind='waymo': input should be 'streetworld', 'nuscenes', 'semantickitti' or 'scannet'",
        ),
        ("dataset.kind=nuscenes", r"dataset\.root must name the nuscenes folder"),
        ("resources.num_workers=3", r"distill\.batch_size=\d+ must be a multiple of resources\.num_workers=3"),
        ("distill.scr=3", r"distill\.scr=3: a group of keys is needed, such as distill\.scr\.weight$"),
        ("dataset=nuscenes", r"dataset='nuscenes': a group of keys is needed, such as dataset\.kind$"),
        (
            "dataset.linked_folders=/fast",
            r"folders='/fast': a list is needed, such as dataset\.linked_folders=\[/fast\]$",
        ),
        ("dataset.linked_folders=['']", r"dataset\.linked_folders\.0='?'?: string should have at least 1 char"),
        ("student.channels=32", r"student\.channels=32: a list is needed, such as student\.channels=\[32\]$"),
        ("student.channels=[32]", r"student\.channels=\[32\]: list should have at least 2 items"),
        (
            "evaluate.methods=student_3d",
            r"evaluate\.methods='student_3d': a list is needed, such as evaluate\.methods=\[student_3d\]$",
        ),
        (
            "distill.stcr.count_empty_slots=true",
            r"count_empty_slots=true needs distill\.stcr\.max_points",
        ),
        ("distill={scr: {weight: 0}, stcr: {weight: 0}}", r"one of them must be above 0$"),
        ("name.first=3", r"override 'name\.first=3': name\.first: name is a value, not a group of keys$"),
        ("base=demo.yaml", r"override 'base=demo\.yaml': base can only be set in the file"),
        ("dataset.train_split=foo", r"dataset\.train_split='foo': input should be 'train', 'val'"),
        ("no-equals", r"override 'no-equals' is not of the form key\.path=value"),
        ("distill.epochs=[", r"override 'distill\.epochs=\[': the value is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_keys_path(override, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_job(JOBS / "demo.yaml", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stage=evaluate", "distill.method=pointcontrast"], "pointcontrast cannot be scored without fine-tuning"),
        (
            ["distill.method=pointcontrast", "distill.augment={rotate: false, flip: false, scale: 0}"],
            "pointcontrast compares two views of a cloud, but distill.augment has rotate, flip and scale off",
        ),
        (["variant=released", "distill.stcr.max_points_per_cell=null"], "count_empty_slots=true needs"),
        (
            ["stage=predict", "predict.network=distilled", "distill.method=pointcontrast"],
            r"pointcontrast has no classes before it is fine-tuned; allowed: predict\.network=finetuned$",
        ),
    ],
)
def test_settings_that_do_not_fit_together(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_job(JOBS / "demo.yaml", overrides)


@pytest.mark.parametrize(
    ("words", "teacher", "finetuned", "initialisations", "trains"),
    [
        ([], True, True, ("pretrained",), True),
        (["finetune.initialisations=[scratch]"], False, True, ("scratch",), True),
        (["finetune.checkpoint=student.safetensors"], False, True, ("pretrained",), True),
        (["predict.network=distilled"], True, False, ("pretrained",), True),
        (["predict.checkpoint=network.safetensors"], False, False, ("pretrained",), False),
    ],
)
def test_predictions_need_the_stages_of_their_network_alone(words, teacher, finetuned, initialisations, trains):
    job = load_job(JOBS / "demo.yaml", ["stage=predict", *words])
    assert (job.needs_teacher, job.finetunes, job.reads_train_split) == (teacher, finetuned, trains)
    assert job.initialisations == initialisations
    assert not job.scores
    before = load_job(JOBS / "demo.yaml", ["stage=finetune", *words])
    assert before.scores
    assert before.finetunes
    assert before.initialisations == before.finetune.initialisations
    assert "predict" not in [stage for stage in STAGES if before.reaches(stage)]


def test_a_mistake_in_a_list_of_groups_has_its_index():
    changed = "columns.streetworld=[{name: a, sett: {}}]"
    with pytest.raises(ConfigError, match=r"columns\.streetworld\.0\.sett: unknown key; allowed here: name, set$"):
        load_table(JOBS / "table1_finetune.yaml", [changed])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "mapping of keys to values, but this is a list$"),
        ("", "but this is empty$"),
        ("a: [", "not valid YAML"),
        ("stage: index\n", "name: required"),
        ("bas: demo.yaml\n", r"bas: unknown key; allowed here: base, .*; did you mean base\?$"),
        (
            "name: a\ndataset: {kind: streetworld}\ndistill.scr.tau: 3\n",
            r"distill\.scr\.tau: unknown key; .*; .* belongs in its group, distill: \{scr: \{tau: \.\.\.\}\}$",
        ),
    ],
)
def test_a_damaged_job_file(tmp_path, text, sentence):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_job(path)


def test_a_missing_job_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the job file"):
        load_job(tmp_path / "nothing.yaml")


def fields(model, prefix=""):
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert field.annotation.__doc__
            yield from fields(field.annotation, f"{key}.")
        else:
            yield key, field


def listed(capsys, *words):
    """What ``clip2scene settings`` prints per key: the rest of its line, and its meaning."""
    assert main(["settings", *words]) == 0
    found, key = {}, None
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("      "):
            found[key][1] += line.strip() + " "
        elif line.startswith("  "):
            key, rest = line.strip().split("  ", 1)
            found[key] = [rest, ""]
    return found


def test_every_setting_is_listed_with_its_meaning(capsys):
    shown = listed(capsys)
    known = dict(fields(Job))
    assert shown.keys() == known.keys()
    assert not {key for key, (_, meaning) in shown.items() if not meaning}
    assert shown["distill.num_sweeps"][0] == "integer, 1 to 10  [3]"
    assert shown["distill.optimiser.momentum"][0] == "number, at least 0, below 1  [0.9]"
    assert shown["student.channels"][0] == "list of integers, 2 to 8 of them  [not given]"
    assert shown["student.use_intensity"][0] == "true or false  [true]"
    assert shown["name"][0] == "text  [required]"
    assert shown["evaluate.methods"][0].endswith("ensemble or pointclip, at least 1 of them  [teacher_2d, student_3d]")


def test_one_setting_or_one_group_is_listed(capsys):
    assert listed(capsys, "distill.stcr.lambda").keys() == {"distill.stcr.lambda"}
    assert listed(capsys, "distill.scr").keys() == {"distill.scr.weight", "distill.scr.tau", "distill.scr.form"}


@pytest.mark.parametrize("model", [Space, Table])
def test_every_setting_of_a_search_space_or_table_is_listed_with_its_meaning(model, capsys):
    shown = listed(capsys, "--sweep" if model is Space else "--table")
    # Groups below a user's own keys are single fields of the model.
    assert {key.partition(".")[0] for key in shown} == {key.partition(".")[0] for key, _ in fields(model)}
    assert not {key for key, (_, meaning) in shown.items() if not meaning}


def test_settings_below_a_users_own_keys_are_listed(capsys):
    shown = listed(capsys, "--sweep")
    assert shown["parameters.KEY.grid"][0] == "list of values, at least 1 of them  [not given]"
    assert shown["parameters.KEY.randint"][0] == "list of integers, 2 of them  [not given]"
    assert shown["variants"][0] == "group of keys  [not given]"
    assert shown["resources.threads_per_worker"][0] == "integer, at least 1  [1]"
    assert listed(capsys, "--sweep", "scheduler").keys() == {
        f"scheduler.{name}" for name in ("kind", "grace_epochs", "reduction_factor")
    }
    shown = listed(capsys, "--table")
    assert shown["columns.KEY.N.name"][0] == shown["rows.N.name"][0] == "text  [required]"


def test_an_unknown_setting_of_a_search_space_is_one_sentence(capsys):
    assert main(["settings", "--sweep", "budget.hour"]) != 0
    sentence = "settings --sweep budget.hour: unknown key; `clip2scene settings --sweep` lists all; did you mean"
    assert f"{sentence} budget.hours?" in capsys.readouterr().err
