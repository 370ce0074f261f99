"""The demonstration: the teacher that comes with the package, four students and pictures, in one command.

Every model is trained by the same commands a user calls, each in a process of its own with one thread, two at a time.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from d3etr_hf.cli.evaluate import evaluate_detector
from d3etr_hf.configurations import read_yaml_file, shipped
from d3etr_hf.data import DataArguments, find_coco_split, load_coco_split
from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.data.transforms import DetectionTransform
from d3etr_hf.errors import DemoError
from d3etr_hf.files import read_json, write_json
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import load_detector
from d3etr_hf.publishing.card import CardArguments
from d3etr_hf.publishing.measurements import METRICS
from d3etr_hf.publishing.publish import prepare
from d3etr_hf.publishing.run_folder import load_run
from d3etr_hf.runs.equal_seconds import steps_in_equal_seconds
from d3etr_hf.runs.output_folder import CONFIGURATION, HISTORY, RESULTS, SECONDS, read_record
from d3etr_hf.visualization.run_pictures import draw_detections_of
from d3etr_hf.visualization.training_curves import draw_training_curves

CONFIGURATIONS = shipped("configs") / "demo"
TEACHER_IMAGES = 8000  # of the teacher that comes with the package; the students see half of them
CONTROLS = {
    "student_alone": "student alone",
    "student_alone_equal_time": "student alone, equal time",
    "teacherless": "teacherless control",
}
COLUMNS = {"teacher": "teacher", "student_alone": "student alone", "distilled": "distilled"}
PROGRESS = re.compile(rb"(\d+)/(\d+) \[")


RUNNING: list[subprocess.Popen] = []


def run_demo(
    folder: Path, data_folder: Path, train_teacher: bool = False, overrides: Sequence[str] = ()
) -> list[dict]:
    """Make the data, show the teacher, train the students that are not trained yet, and write results and pictures.

    Args:
        folder: gets one folder for each model, `results.json`, `teacher.png`, `detections.png`, `curves.png` and
            `logs/`; the folder of the distilled student gets a model card.
        data_folder: gets the shapes.
        train_teacher: train the teacher, too, instead of taking the one that comes with the package.
        overrides: further flags for every training run.

    Returns:
        What `results.json` holds: for each model name, AP and AP50 (0..1), parameters, milliseconds an image,
        optimizer steps and seconds of training.

    Raises:
        DemoError: a run failed; the message names its log.
    """
    summary = folder / RESULTS
    if summary.exists():
        print(f"The demonstration is done already; remove {folder} to run it again.")
        return read_json(summary, "remove it, and the same call makes it anew")
    make_shapes(data_folder)
    results = {"teacher": prepare_teacher(folder, data_folder, train_teacher, overrides)}
    results |= train_students(folder, data_folder, overrides)
    histories = {name: folder / name / HISTORY for name in results}
    draw_training_curves(
        {name: read_record(path) for name, path in histories.items() if path.exists()}, folder / "curves.png"
    )
    draw_demo_detections(folder, data_folder, COLUMNS, folder / "detections.png")
    compared = [f"{title}={folder / name}" for name, title in CONTROLS.items()]
    prepare(load_run(folder / "distilled"), CardArguments(compare=compared))
    measured = read_record(folder / "distilled" / METRICS)
    rows = [
        {
            "name": name,
            "milliseconds": measured["teacher" if name == "teacher" else "student"]["milliseconds"]["median"],
        }
        | {key: result[key] for key in ("AP", "AP50", "parameters", "steps", "seconds")}
        for name, result in results.items()
    ]
    write_json(summary, rows)
    return rows


def prepare_teacher(folder: Path, data_folder: Path, train: bool, overrides: Sequence[str] = ()) -> dict:
    """Copy the teacher that comes with the package, or train it, and show what it can; its results.

    One that was trained here before stays.

    Raises:
        DemoError: it was not trained to the end.
    """
    place = folder / "teacher"
    if train:
        scenes = str(make_shapes(folder / "teacher_data", train_images=TEACHER_IMAGES))
        command = ["train", str(CONFIGURATIONS / "teacher.yaml"), "--data_folder", scenes, *overrides]
        train_one("teacher", command, folder)
    elif not (place / CONFIGURATION).exists():
        shutil.copytree(shipped("model_cards") / "shapes_teacher", place, dirs_exist_ok=True)
    elif not (place / RESULTS).exists():
        raise DemoError(
            f"{place} holds a teacher whose training is not finished: pass --train_teacher true to finish it, or "
            "remove the folder to take the one that comes with the package"
        )
    evaluated = evaluate_detector(DataArguments(data_folder=str(data_folder)), str(place), str(place))
    results = read_record(place / RESULTS) | evaluated
    picture = folder / "teacher.png"
    draw_demo_detections(folder, data_folder, {"teacher": "teacher"}, picture)
    print(f"The teacher ({results['parameters']:,} parameters) has AP {100 * results['AP']:.1f}; drawn: {picture}")
    return results


def train_students(folder: Path, data_folder: Path, overrides: Sequence[str] = ()) -> dict[str, dict]:
    """Train the four students, two at a time, each one going on where it was; results by name."""
    data = ["--data_folder", str(data_folder), *overrides]
    distil = ["distill", str(CONFIGURATIONS / "distill.yaml"), "--teacher", str(folder / "teacher"), *data]
    control = ["distill", str(CONFIGURATIONS / "teacherless.yaml"), *data]
    alone = ["train", str(CONFIGURATIONS / "student.yaml"), *data]

    with ThreadPoolExecutor(max_workers=2) as pool, stopping(pool):

        def start(name: str, command: list[str]):
            return pool.submit(train_one, name, command, folder)

        distilled, student_alone = start("distilled", distil), start("student_alone", alone)
        steps = equal_time_steps(folder, student_alone.result(), distilled)
        equal_time = start("student_alone_equal_time", [*alone, "--max_steps", str(steps)])
        runs = {
            "student_alone": student_alone,
            "teacherless": start("teacherless", control),
            "distilled": distilled,
            "student_alone_equal_time": equal_time,
        }
        return {name: run.result() for name, run in runs.items()}


def equal_time_steps(folder: Path, student_alone: dict, distilled: Future) -> int:
    """How many steps the student alone takes in the time of the distilled run: its own full schedule is that long.

    The time of a distilled step is known from its first save, so that both can run side by side, under the same load.
    A run that has been started keeps its length.
    """
    started, spent = folder / "student_alone_equal_time" / CONFIGURATION, folder / "distilled" / SECONDS
    if started.exists():
        return read_yaml_file(started)["max_steps"]
    while not (spent.exists() or distilled.done()):
        time.sleep(1)
    if distilled.done():
        distilled.result()  # a failure is told here
    return steps_in_equal_seconds(student_alone["steps"], [(read_record(spent), student_alone)])


@contextmanager
def stopping(pool: ThreadPoolExecutor) -> Iterator[None]:
    """On a failure or an interruption start no further run and end those that are under way."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in RUNNING:
            process.terminate()
        raise


def train_one(name: str, command: list[str], folder: Path) -> dict:
    """Run one training command of `d3etr` to its end, showing how far it is; its results."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--quiet",
        "--module",
        "d3etr_hf.cli.main",
        *command,
        "--output_dir",
        str(folder / name),
    ]
    # two processes that spin on both cores are many times slower than one thread each
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(launch, stdout=output, stderr=subprocess.STDOUT, env=environment)
    RUNNING.append(process)
    with tqdm(desc=name, unit="step", leave=True) as bar:
        while process.poll() is None:
            time.sleep(1)
            show_progress(log, start, bar)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise DemoError(f"the run {name!r} failed with exit code {process.returncode}; its log is {log}:\n{tail}")
    return read_record(folder / name / RESULTS)


def show_progress(log: Path, start: int, bar: tqdm) -> None:
    """Bring a bar to where the training bar in a log stands."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 4000))
        found = [(int(done), int(total)) for done, total in PROGRESS.findall(file.read())]
    # evaluation shows bars of its own, with far fewer steps
    training = [(done, total) for done, total in found if total >= (bar.total or 100)]
    if training:
        bar.total = training[-1][1]
        bar.n = training[-1][0]
        bar.refresh()


def draw_demo_detections(folder: Path, data_folder: Path, columns: Mapping[str, str], path: Path) -> None:
    """A grid of the first validation images: ground truth, then each of these models (folder → title)."""
    val = load_coco_split(*find_coco_split(data_folder, "val"))
    models = {
        title: (
            load_detector(str(folder / name)),
            val.with_transform(DetectionTransform(load_image_processor(str(folder / name)))),
        )
        for name, title in columns.items()
    }
    draw_detections_of(models, val, path)


def format_table(rows: list[dict]) -> str:
    """The results as one table for a terminal."""
    lines = [f"{'model':<26}{'AP':>6}{'AP50':>6}{'parameters':>12}{'ms':>6}{'steps':>7}{'seconds':>9}"]
    for row in rows:
        lines.append(
            f"{row['name']:<26}{100 * row['AP']:>6.1f}{100 * row['AP50']:>6.1f}{row['parameters']:>12,}"
            f"{row['milliseconds']:>6.1f}{row['steps']:>7}{row['seconds']:>9.0f}"
        )
    return "\n".join(lines)
