"""`d3etr compare`: what is run, gone on with, refused and reported."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from d3etr_hf.cli import compare
from d3etr_hf.configurations import read_yaml, write_yaml
from d3etr_hf.data import DataArguments
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import (
    CommandLineError,
    ComparisonError,
    DatasetError,
    DetectorLoadError,
    UnsupportedOptionError,
    WriteError,
)
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import ModelArguments, TeacherArguments
from d3etr_hf.runs import inputs, run_pool
from d3etr_hf.runs.comparison import STANDARD_MODES, Comparison
from d3etr_hf.runs.comparison_results import read_lines
from d3etr_hf.runs.inputs import InputsNow
from d3etr_hf.runs.planned_run import plan
from d3etr_hf.runs.run_pool import Job
from tests.cli.test_training_run import model_config
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = 64
# stands for `d3etr train` and `distill`: a journal of its calls, and results; "bad" in the file's place fails it
FAKE = """
import json, pathlib, sys
configuration, journal, values = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
folder = configuration.with_suffix("")
with open(journal, "a") as file:
    file.write(folder.name.rpartition("_")[0] + "\\n")
if (configuration.parent / "bad").exists():
    sys.exit("out of memory")
folder.mkdir()
(folder / "environment.json").write_text('{"device": "CPU", "threads": 1}')
(folder / "results.json").write_text(json.dumps(values))
"""
RUNS = ["teacher_seed_0", "alone_seed_0", "distilled_seed_0", "alone_seed_1", "distilled_seed_1"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 16, 8, image_size=SIDE, progress=False)


@pytest.fixture
def content(tmp_path, shapes) -> dict:
    """What a file holds: one entry, alone and distilled, of tiny models and two steps."""
    return {
        "output_dir": str(tmp_path / "runs"),
        "results": str(tmp_path / "out" / "results.jsonl"),
        "modes": ["alone", "distilled"],
        "shared": {
            "data_folder": str(shapes),
            "short_side": SIDE,
            "long_side": SIDE,
            "augmentation": "none",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
        },
        "entries": {
            "tiny": {"teacher": {"model_config": model_config()}, "student": {"model_config": model_config()}}
        },
    }


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls the command on what a file is to hold; what it prints. Its `said` is what went to stderr."""

    def run(content: dict, *flags: str) -> str:
        path = tmp_path / "comparison.yaml"
        path.write_text(write_yaml(content))
        monkeypatch.setattr(sys, "argv", ["d3etr compare", str(path), *flags])
        compare.main()
        printed = capsys.readouterr()
        run.said = printed.err
        return printed.out

    return run


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """The runs that were started, which then are not real: AP 0.1 alone, 0.3 distilled, and the seed's tenth more."""

    def job_of(run) -> Job:
        ap = {"teacher": 0.9, "alone": 0.1, "distilled": 0.3, "longer": 0.1}[run.mode] + run.seed / 10
        seconds = {"distilled": 4.0 + 4 * run.seed}.get(run.mode, 2.0)
        values = json.dumps({"AP": ap, "AP50": 0.95, "parameters": 5, "steps": 2, "seconds": seconds})
        command = [sys.executable, "-c", FAKE, str(run.configuration), str(path), values]
        return Job(run.name, command, run.log, tuple(needed.name for needed in run.needs))

    path = tmp_path / "journal"
    monkeypatch.setattr(compare, "job_of", job_of)
    return lambda: path.read_text().splitlines() if path.exists() else []


def test_whole_comparison(content, call, shapes, monkeypatch, fresh_processes, tmp_path):
    """The teacher as in earnest, in a process of its own; the students in processes that start faster."""
    start = run_pool.start

    class Ended:
        def __init__(self, status: int):
            self.returncode = status

        def poll(self) -> int:
            return self.returncode

    def start_faster(job, descriptor):
        if "teacher" in job.name:
            return start(job, descriptor)
        result = fresh_processes.script(REPOSITORY / "scripts" / f"{job.command[3]}.py", job.command[4])
        assert result.returncode == 0, result.stderr
        return Ended(result.returncode)

    monkeypatch.setattr(run_pool, "start", start_faster)
    printed = call(content)
    lines = {line["mode"]: line for line in read_lines(Path(content["results"]))}
    assert lines.keys() == {"teacher", "alone", "distilled"}
    for mode, line in lines.items():
        assert 0 <= line["AP"] <= line["AP50"] <= 1 and line["seconds"] > 0
        assert (line["family"], line["seed"], line["steps"], line["threads"]) == ("tiny", 0, 2, 1)
        assert line["teacher"] == ("tiny" if mode == "distilled" else None)
    (folder,) = (tmp_path / "runs" / "tiny").glob("distilled_seed_0_????????????")
    (teacher,) = (tmp_path / "runs" / "tiny").glob("teacher_seed_0_????????????")
    assert read_yaml((folder / "run.yaml").read_text())["teacher"] == str(teacher)
    assert (tmp_path / "out" / "results.md").read_text() in printed and "3 of 3 runs" in printed
    assert "| tiny | distilled | " in printed
    assert Image.open(tmp_path / "out" / "results.png").size[0] > 500
    # the same call again has nothing to do, unless what those runs have read is another by now
    assert call(content) == printed
    (alone,) = (tmp_path / "runs" / "tiny").glob("alone_seed_0_????????????")
    for file, said in (
        (shapes / "annotations" / "val.json", f"the validation annotations changed .*{teacher}, {alone}, {folder}"),
        (teacher / "config.json", f"the teacher changed after these runs were done: {folder}"),
    ):
        before = file.read_text()
        try:
            file.write_text(f"{before} ")
            with pytest.raises(ComparisonError, match=rf"^{said}\. Put back .*, or remove these folders"):
                call(content)
        finally:
            file.write_text(before)
    assert call(content) == printed


def test_a_model_that_is_gone_is_not_compared(shapes, tmp_path):
    """As the teacher of another comparison may be, whose students are done; or as the cache holds a newer one of a Hub
    id, of which nothing but the configuration was looked at."""
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "config.json").write_text("{}")
    data, now = DataArguments(data_folder=str(shapes)), InputsNow()
    gone, newer = (
        now.identity(ModelArguments(model_config={}), TeacherArguments(teacher=str(tmp_path / name)), data)
        for name in ("gone", "newer")
    )
    (tmp_path / "newer" / "model.safetensors").write_text("1")
    loaded = InputsNow().identity(ModelArguments(model=str(tmp_path / "newer")), TeacherArguments(), data)
    assert loaded.keys() - newer.keys() == {"model to start from"}
    assert gone == newer
    found = newer
    digests = [
        hashlib.sha256(hashlib.sha256((shapes / "annotations" / f"{split}.json").read_bytes()).hexdigest().encode())
        for split in ("train", "val")
    ]
    names = ("training annotations", "validation annotations")
    assert found == {name: each.hexdigest()[:12] for name, each in zip(names, digests, strict=True)}


def test_data_and_models_are_read_once_for_all_runs(shapes, tmp_path, monkeypatch):
    """However the runs see the images, and whatever each calls the model."""
    read = []
    for name in ("load_annotated", "checkpoint_at"):
        really = getattr(inputs, name)
        monkeypatch.setattr(inputs, name, lambda of, really=really: read.append(of) or really(of))
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    now, folder = InputsNow(), str(tmp_path / "teacher")
    small = DataArguments(data_folder=str(shapes), short_side=32, long_side=32, augmentation="multiscale")
    large = DataArguments(data_folder=str(shapes))
    taught = now.identity(ModelArguments(model_config={}), TeacherArguments(teacher=folder), small)
    again = now.identity(ModelArguments(model=folder), TeacherArguments(), large)
    assert len(read) == 2 and taught["teacher"] == again["model to start from"]


def test_a_stopped_comparison_goes_on(content, call, journal, monkeypatch):
    """Stopped after a run had ended and before its line was written: no run is started twice."""
    record = compare.record

    def stop_at_distilled(path, line):
        if line["mode"] == "distilled":
            raise KeyboardInterrupt
        record(path, line)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(compare, "record", stop_at_distilled)
        call(content, "--seeds", "0", "1", "--workers", "1")
    assert journal() == RUNS[:3]
    results = Path(content["results"])
    assert [line["mode"] for line in read_lines(results)] == ["teacher", "alone"]
    listed = call(content, "--seeds", "0", "1", "--list").splitlines()
    assert [row.split()[0] for row in listed[:5]] == ["done", "done", "done", "to", "to"]
    assert listed[0].endswith("tiny teacher seed 0  AP 90.0") and listed[5] == "3 of 5 runs are done"
    assert journal() == RUNS[:3]
    printed = call(content, "--seeds", "0", "1", "--workers", "1")
    assert journal() == RUNS
    assert [(line["mode"], line["seed"]) for line in read_lines(results)][2:] == [
        ("distilled", 0),
        ("alone", 1),
        ("distilled", 1),
    ]
    assert "| tiny | 5 | 90.0 | 15.0 ± 7.1 | 35.0 ± 7.1 |" in printed
    before = results.read_bytes()
    assert call(content, "--seeds", "0", "1") == printed and journal() == RUNS and results.read_bytes() == before


def test_equal_seconds(content, call, journal, tmp_path):
    """The distilled student takes 3 seconds a step in the mean of its seeds, the student alone one: 6 steps of 2."""
    content["modes"].append("longer")
    content["mode_options"] = {"longer": {"same_as": "alone", "equal_seconds_with": "distilled"}}
    printed = call(content, "--seeds", "0", "1")
    assert sorted(journal()[:5]) == sorted(RUNS) and sorted(journal()[5:]) == ["longer_seed_0", "longer_seed_1"]
    files = [*(tmp_path / "runs" / "tiny").glob("longer_seed_?_????????????.yaml")]
    assert [read_yaml(file.read_text())["max_steps"] for file in files] == [6, 6]
    assert "| tiny | distilled minus longer | +20.0 | +20.0 (0), +20.0 (1) | " in printed
    assert call(content, "--seeds", "0", "1") == printed and len(journal()) == 7


def test_modes_on_the_command_line_narrow_the_file(content, call, journal):
    content |= {"modes": ["alone", "mine", "distilled"], "mode_options": {"mine": {}}, "baseline": "mine"}
    call(content, "--modes", "alone", "distilled")
    assert sorted(journal()) == sorted(RUNS[:3])
    with pytest.raises(CommandLineError, match="modes: nobody defines 'min': give its options in mode_options"):
        call(content, "--modes", "alone", "min")
    with pytest.raises(CommandLineError, match="mode_options: 'mine' is none of the modes"):
        call(content | {"modes": ["alone", "distilled"], "baseline": None})


def test_pairs_keep_the_options_of_their_mode(content, call, journal, tmp_path):
    """They are distilled whatever modes the command line names."""
    tiny = content["entries"]["tiny"]
    content["entries"]["other"] = tiny | {"options": {"learning_rate": 1e-3}}
    content["mode_options"] = {"distilled": {"prediction_weight": 2.0}}
    call(content | {"modes": ["alone", "distilled"], "baseline": "alone"}, "--modes", "alone")
    assert "distilled_seed_0" not in journal()
    content["pairs"] = {"teachers": ["tiny"], "students": ["other"]}
    call(content, "--modes", "alone")
    (file,) = (tmp_path / "runs" / "other").glob("distilled_from_tiny_seed_0_????????????.yaml")
    assert read_yaml(file.read_text())["prediction_weight"] == 2.0


def test_curves_from_the_results_alone(content, call, journal, tmp_path):
    """Drawn of lines that hold evaluations, which those of a run without them do not."""
    assert "_curves.png" not in call(content)
    results = Path(content["results"])
    lines = [line | {"evaluations": [[1, 0.1], [2, line["AP"]]]} for line in read_lines(results)]
    results.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    printed = call(content, "--report")
    curves = tmp_path / "out" / "results_tiny_curves.png"
    assert printed.strip().endswith(f"results.png, {curves}") and Image.open(curves).size[0] > 500


def test_budgets_from_the_results_alone(content, call, journal, tmp_path):
    """One picture of all entries, which differ in their students' length."""
    longer = {"student": content["entries"]["tiny"]["student"] | {"max_steps": 4}, "teacher": {"entry": "tiny"}}
    content["entries"]["longer"] = longer
    assert "_budgets.png" not in call(content)  # the runs that stand for them all say that they took two steps
    results = Path(content["results"])
    lines = [line | {"steps": 4 if line["family"] == "longer" else 2} for line in read_lines(results)]
    results.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    printed = call(content, "--report")
    budgets = tmp_path / "out" / "results_budgets.png"
    assert printed.strip().endswith(f"results.png, {budgets}") and Image.open(budgets).size[0] > 500


def test_a_run_whose_folder_is_gone_is_run_again(content, call, journal, tmp_path):
    """Its line alone is no checkpoint for a student; the line is then the new run's, and not a second one."""
    call(content)
    assert "run again" not in call.said
    (folder,) = (tmp_path / "runs" / "tiny").glob("teacher_seed_0_????????????")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    content["seeds"] = [0, 1]
    call(content, "--seeds", "0")
    assert f"1 of the 1 runs to do have results in {content['results']}, but no folder in" in call.said
    assert sorted(journal()) == sorted([*RUNS[:3], "teacher_seed_0"])
    assert len(read_lines(Path(content["results"]))) == 3


def test_a_picture_that_cannot_be_written_fails_one_run_and_loses_no_result(content, call, journal, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    content["modes"] = ["alone"]
    content["seeds"] = [0, 1]
    monkeypatch.setattr(compare, "draw_comparison", full)
    with pytest.raises(ComparisonError, match=r"2 of 2 runs failed.*\n.*results.png.*No space left on device"):
        call(content)
    assert len(read_lines(Path(content["results"]))) == 2


def test_changed_options_are_run_beside_the_old_ones(content, call, journal):
    call(content)
    content["entries"]["tiny"]["student"]["max_steps"] = 3
    printed = call(content)
    assert sorted(journal()) == sorted([*RUNS[:3], *RUNS[1:3]])
    assert len(read_lines(Path(content["results"]))) == 5
    assert "2 lines of" in printed and "are of other options or seeds, and left out" in printed


def test_a_run_that_fails_does_not_end_the_others_and_is_tried_again(content, call, journal, tmp_path):
    content["entries"]["other"] = content["entries"]["tiny"]
    bad = tmp_path / "runs" / "tiny" / "bad"
    bad.parent.mkdir(parents=True)
    bad.touch()
    with pytest.raises(ComparisonError) as caught:
        call(content)
    message = str(caught.value)
    assert message.startswith("3 of 6 runs failed, and the same call tries them again; the others are done:\n")
    assert "tiny alone seed 0: ended with status 1: out of memory (all of it: " in message
    assert "tiny distilled seed 0: not started, since tiny teacher seed 0 failed" in message
    assert {line["family"] for line in read_lines(Path(content["results"]))} == {"other"}
    assert "3 of 6 runs" in call(content, "--report")
    bad.unlink()
    assert "6 of 6 runs" in call(content)
    assert sorted(journal()) == sorted([*RUNS[:3], *RUNS[:3], *RUNS[:2]])


def test_results_that_cannot_be_written_or_read_are_told_before_a_run_starts(content, call, journal, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(WriteError, match="out cannot be written"):
        call(content)
    (tmp_path / "results.jsonl").write_text("no result\n\n")
    with pytest.raises(ComparisonError, match="results.jsonl: line 1 is no result of d3etr compare: remove it"):
        call(content | {"results": str(tmp_path / "results.jsonl")})
    assert not journal()


def test_a_report_needs_results(content, call):
    with pytest.raises(ComparisonError, match="results.jsonl holds no result of these runs: call d3etr compare"):
        call(content, "--report")


# refused before anything is started


@pytest.fixture
def refused(content, call, journal):
    """The message of a call after a change of the content."""

    def message(error: type[Exception] = CommandLineError, **changes) -> str:
        with pytest.raises(error) as caught:
            call(content | changes)
        assert not journal()
        return str(caught.value)

    return message


def test_unknown_keys_and_options_are_named_with_their_place(content, refused, tmp_path):
    file, shared, tiny = tmp_path / "comparison.yaml", content["shared"], content["entries"]["tiny"]
    assert refused(sedes=[0]) == f"{file}: unknown key 'sedes'; did you mean 'seeds'?"
    message = refused(shared=shared | {"max_stepz": 3})
    assert message == f"{file}: tiny teacher seed 0: unknown key 'max_stepz'; did you mean 'max_steps'?"
    message = refused(mode_options={"distilled": {"prediction_weight": "much"}})
    assert message.startswith(f"{file}: tiny distilled seed 0: 'prediction_weight' must be of type float, got 'much'")
    message = refused(mode_options={"alone": {"auxiliary_queries": "nine"}})
    assert message.startswith(f"{file}: tiny alone seed 0: ") and "'nine'" in message
    message = refused(entries={"tiny": tiny | {"student": {}}})
    assert "tiny alone seed 0: give either 'model' (a checkpoint) or 'model_config' (a new model)" in message
    message = refused(shared=shared | {"prediction_weight": 2.0})
    assert f"{file}: tiny teacher seed 0: ['prediction_weight'] belong to distillation" in message
    assert refused(modes=["alone", "magic"]).startswith(f"{file}: modes: nobody defines 'magic'")
    assert refused(entries={"tiny": {"teacher": {}}}).startswith(f"{file}: entries: tiny: there is no 'student'")


def test_entries_of_one_name_are_refused(content, call, tmp_path, monkeypatch):
    path = tmp_path / "twice.yaml"
    path.write_text("entries:\n  a: {student: {}}\n  a: {student: {}}\n")
    monkeypatch.setattr(sys, "argv", ["d3etr compare", str(path)])
    with pytest.raises(CommandLineError, match='twice.yaml: not valid YAML: found duplicate key "a".*line 3'):
        compare.main()


def test_models_teachers_and_data_are_looked_for_first(content, refused, tmp_path):
    tiny = content["entries"]["tiny"]
    message = refused(DetectorLoadError, entries={"tiny": tiny | {"teacher": str(tmp_path / "nowhere")}})
    assert "tiny distilled seed 0: teacher" in message and "nowhere': there is no such folder" in message
    message = refused(DetectorLoadError, entries={"tiny": tiny | {"student": {"model_config": "nowhere.yaml"}}})
    assert "nowhere.yaml" in message
    student = {"model_config": model_config() | {"wings": 2}}
    message = refused(DetectorLoadError, entries={"tiny": tiny | {"student": student}})
    assert "tiny alone seed 0: model_config: " in message and "has no ['wings']" in message
    photos = STANDARD_MODES["alone"] | {"unlabeled_images": content["shared"]["data_folder"]}
    message = refused(UnsupportedOptionError, mode_options={"alone": photos})
    assert "comparison.yaml: tiny alone seed 0: unlabeled_images: only a teacher can supervise" in message
    assert message.endswith("or give it to modes with a teacher alone, in mode_options")
    message = refused(DatasetError, shared=content["shared"] | {"data_folder": str(tmp_path / "nothing")})
    assert f"data_folder {str(tmp_path / 'nothing')!r}: there is no such folder" in message


def test_a_model_to_start_from_is_looked_for_first(content, refused, tmp_path):
    student = {"model": str(tmp_path / "nowhere")}
    message = refused(DetectorLoadError, entries={"tiny": content["entries"]["tiny"] | {"student": student}})
    assert "comparison.yaml: tiny alone seed 0: model" in message and "nowhere': there is no such folder" in message


def test_each_run_is_compared_with_the_data_of_its_own_options(content, monkeypatch):
    """A mode may have others than the rest."""
    options = {"few": STANDARD_MODES["alone"] | {"data_folder": "few"}}
    runs = plan(Comparison(**(content | {"modes": ["alone", "few"], "mode_options": options})))
    read = {run.folder: {"training annotations": run.options["data_folder"]} for run in runs}
    monkeypatch.setattr(compare, "is_finished", lambda run: True)
    monkeypatch.setattr(compare, "identity_of", read.get)
    monkeypatch.setattr(InputsNow, "identity", lambda now, *sources: {"training annotations": sources[2].data_folder})
    compare.refuse_changed_inputs(runs)
    assert len({each["training annotations"] for each in read.values()}) == 2


def test_a_run_that_was_stopped_is_listed_with_its_newest_whole_checkpoint(content, call, tmp_path):
    """One whose saving was cut off has no state yet."""
    _, alone, distilled = plan(Comparison(**content))
    for run, names in ((alone, ("checkpoint-2", "checkpoint-10", "checkpoint-12")), (distilled, ("checkpoint-2",))):
        for name in names:
            (run.folder / name).mkdir(parents=True)
    for name in ("checkpoint-2", "checkpoint-10"):
        (alone.folder / name / "trainer_state.json").write_text("{}")
    rows = call(content, "--list").splitlines()
    assert [row.partition("  ")[0].strip() for row in rows[:3]] == ["to run", "to go on from checkpoint-10", "to run"]


def test_a_checkpoint_teaches(content, call, journal, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    load_image_processor(None, SIDE, SIDE).save_pretrained(tmp_path / "teacher")
    content["entries"]["tiny"]["teacher"] = str(tmp_path / "teacher")
    call(content)
    assert sorted(journal()) == ["alone_seed_0", "distilled_seed_0"]
