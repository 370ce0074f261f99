"""A comparison as its file says it: entries × modes × seeds, and what that means in runs, in their order."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from d3etr_hf.configurations import option
from d3etr_hf.runs.longer_run import OF_LENGTH
from d3etr_hf.training.distillation import Distillation
from d3etr_hf.training.training_arguments import fields_of

TEACHER, ALONE, DISTILLED = "teacher", "alone", "distilled"
OF_PAIR = "→"  # between the teacher's entry and the student's in the name of a pair
# what `mode_options` need not say
STANDARD_MODES: dict[str, dict] = {
    ALONE: {"auxiliary_queries": "none", "adaptive_matching": False},
    "teacherless": {"auxiliary_queries": "learned", "adaptive_matching": False},
    DISTILLED: {},
}
# a mode that is another one, trained for as long as a third takes; see `EqualSeconds`
SAME_AS, EQUAL_SECONDS_WITH = "same_as", "equal_seconds_with"
# each run's own, which no part of the file may set
SET_BY_THE_COMPARISON = ("output_dir", "seed", "teacher")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class Comparison:
    """Which students are compared: each entry (a family, or a pair) in each mode with each seed.

    Raises:
        ValueError: the parts do not fit together; the message names the part and what to do.
    """

    output_dir: str = field(metadata={"help": "Gets a folder for each entry, and in it one for each run."})
    results: str = field(
        metadata={
            "help": "Gets one JSON line for each finished run; its table (.md) and pictures (.png) lie beside it."
        }
    )
    entries: dict[str, dict] = field(
        metadata={
            "help": "By name: `student`, options of its students; `teacher`, options of the run that trains it, the "
            "folder or Hub id of a checkpoint, or {entry: NAME}, which is the teacher of another entry; `options`, "
            "of both. Options are those of d3etr distill, for teachers of d3etr train."
        }
    )
    shared: dict = option({}, "Options of every run.")
    modes: list[str] = option(list(STANDARD_MODES), "What is done with every entry's student.")
    mode_options: dict[str, dict] = option(
        {},
        "Options by mode, of modes other than alone, teacherless and distilled, or instead of what those mean; or "
        "{same_as: MODE, equal_seconds_with: OTHER}, which is MODE for as many steps as take the seconds of OTHER, by "
        "the median over seeds of how many times as long its steps take; on a CPU in the processor's own time, "
        "that of data loader workers aside.",
    )
    baseline: str | None = option(
        None, "The mode whose AP the table subtracts from that of the others; by default alone, if it is a mode."
    )
    pairs: dict[str, list[str]] | None = option(
        None, "{teachers: [NAME, ...], students: [NAME, ...]}: each student distilled by each entry's teacher, too."
    )
    seeds: list[int] = option([0], "Seeds of the students. All entries are run with the first, then with the next.")
    teacher_seeds: list[int] = option([0], "Seed of the teachers that are trained; or one for every seed of students.")
    workers: int = option(2, "Runs at once, each a process with one thread.")

    def __post_init__(self):
        if not self.results.endswith(".jsonl"):
            raise ValueError(f"results is {self.results!r}: must end with .jsonl; table and pictures lie beside it")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}: it must be at least 1")
        _check_seeds(self.seeds, self.teacher_seeds)
        _check_options("shared", self.shared)
        self._check_modes()
        if not self.entries:
            raise ValueError("entries is empty: name at least one, with a student")
        for name in self.entries:
            self._check_teacher_of(self.entry(name))
        self._check_pairs()
        for entry, mode in self.students():
            if self.reads_teacher(entry, mode) and entry.teacher is None:
                raise ValueError(
                    f"entries: {entry.name!r} has no teacher, which the mode {mode!r} needs: give its options, a "
                    "checkpoint, or {entry: NAME}"
                )

    def entry(self, name: str) -> "Entry":
        """An entry of the file by its name, its teacher looked up where it is another entry's."""
        entry = read_entry(name, self.entries[name])
        if entry.teacher_entry in (name, None) or entry.teacher_entry not in self.entries:
            return entry
        lender = read_entry(entry.teacher_entry, self.entries[entry.teacher_entry])
        return Entry(name, entry.options, entry.student, lender.teacher, entry.teacher_entry)

    def pair(self, teacher: str, student: str) -> "Entry":
        """The student of one entry under the teacher of another; the entry itself where the two are one."""
        entry, lender = self.entry(student), self.entry(teacher)
        if entry.teacher_entry == teacher:
            return entry
        return Entry(f"{teacher}{OF_PAIR}{student}", entry.options, entry.student, lender.teacher, teacher, student)

    def all_pairs(self) -> list["Entry"]:
        """What `pairs` asks for, by student, then by teacher."""
        pairs = self.pairs or {"teachers": [], "students": []}
        return [self.pair(teacher, student) for student in pairs["students"] for teacher in pairs["teachers"]]

    def students(self) -> list[tuple["Entry", str]]:
        """Every entry with every mode, then the pairs, each once, as they are run with each seed."""
        found = {(name, mode): self.entry(name) for name in self.entries for mode in self.modes}
        found |= {(entry.name, DISTILLED): entry for entry in self.all_pairs()}
        return [(entry, mode) for (_, mode), entry in found.items()]

    def mode(self, name: str) -> dict:
        """The options of a mode."""
        if (equal := self.equal_seconds(name)) is not None:
            return self.mode(equal.same_as)
        return self.mode_options[name] if name in self.mode_options else STANDARD_MODES[name]

    def equal_seconds(self, name: str) -> "EqualSeconds | None":
        """What decides how long a mode's runs are, where that is the seconds of another mode's."""
        options = self.mode_options.get(name, {})
        if not {SAME_AS, EQUAL_SECONDS_WITH} & options.keys():
            return None
        return EqualSeconds(options.get(SAME_AS), options.get(EQUAL_SECONDS_WITH))

    def student_options(self, entry: "Entry", mode: str) -> dict:
        """The options of a student's run, its seed, folder and teacher aside."""
        return self.shared | entry.options | entry.student | self.mode(mode)

    def teacher_options(self, name: str) -> dict:
        """The options of the run that trains the teacher of an entry, its seed and folder aside."""
        return self.shared | self.entry(name).options | self.entries[name]["teacher"]

    def reads_teacher(self, entry: "Entry", mode: str) -> bool:
        """Whether a student's run reads its teacher at all."""
        options = self.student_options(entry, mode)
        given = {name: options[name] for name in fields_of(Distillation) if name in options}
        try:
            return bool(options.get("inherit_from_teacher")) or Distillation(**given).needs_teacher
        except TypeError:
            return True  # a weight that is no number, as the run's own options will say

    @property
    def differs_in_length_alone(self) -> bool:
        """Whether its entries, at least two, are one student under one teacher, trained for more and fewer steps."""
        rest, lengths = [], []
        for entry in map(self.entry, self.entries):
            # one that is trained for longer is another teacher
            teacher = self.teacher_options(entry.teacher_entry) if isinstance(entry.teacher, dict) else entry.teacher
            student = entry.options | entry.student
            lengths.append([student.get(key) for key in OF_LENGTH])
            rest.append((teacher, {key: value for key, value in student.items() if key not in OF_LENGTH}))
        different = all(lengths.count(each) == 1 for each in lengths)
        return len(rest) > 1 and different and all(each == rest[0] for each in rest)

    @property
    def subtracted(self) -> str | None:
        """The mode whose AP is subtracted from that of the others, if there is one."""
        return self.baseline or (ALONE if ALONE in self.modes else None)

    def _check_modes(self) -> None:
        _refuse_repetition("modes", self.modes)
        if not self.modes:
            raise ValueError("modes is empty: name at least one")
        used = {*self.modes} | ({DISTILLED} if self.pairs else set())
        for name in self.modes:
            _check_name("modes", name)
            if name == TEACHER:
                raise ValueError("modes: 'teacher' is what the runs of teachers are called: choose another name")
            if name not in STANDARD_MODES and name not in self.mode_options:
                raise ValueError(
                    f"modes: nobody defines {name!r}: give its options in mode_options, or choose among "
                    f"{', '.join(STANDARD_MODES | self.mode_options)}"
                )
        for name, options in self.mode_options.items():
            if name not in used:
                raise ValueError(
                    f"mode_options: {name!r} is none of the modes {self.modes}: add it there, or remove it"
                )
            _check_options(f"mode_options: {name}", options)
            self._check_equal_seconds(name)
        if self.baseline is not None and self.baseline not in self.modes:
            raise ValueError(f"baseline is {self.baseline!r}: choose one of the modes {self.modes}")
        if self.baseline is not None and self.equal_seconds(self.baseline) is not None:
            raise ValueError(
                f"baseline is {self.baseline!r}, whose runs have other steps than those of the other modes: choose a "
                "mode with steps of its own; at equal seconds the two modes are compared anyway"
            )

    def _check_equal_seconds(self, name: str) -> None:
        if (equal := self.equal_seconds(name)) is None:
            return
        place = f"mode_options: {name}"
        if self.mode_options[name].keys() != {SAME_AS, EQUAL_SECONDS_WITH}:
            raise ValueError(f"{place}: give {{{SAME_AS}: MODE, {EQUAL_SECONDS_WITH}: MODE}} and nothing besides")
        for key, other in ((SAME_AS, equal.same_as), (EQUAL_SECONDS_WITH, equal.other)):
            if other not in self.modes or self.equal_seconds(other) is not None:
                measured = [mode for mode in self.modes if self.equal_seconds(mode) is None]
                remedy = "" if other in self.modes else ", or add it to modes"
                raise ValueError(f"{place}: {key} is {other!r}: choose one of the modes {measured}{remedy}")
        if equal.same_as == equal.other:
            raise ValueError(f"{place}: {SAME_AS} and {EQUAL_SECONDS_WITH} are both {equal.other!r}: name two modes")

    def _check_teacher_of(self, entry: "Entry") -> None:
        lender = entry.teacher_entry
        if lender is None:
            return
        if lender not in self.entries:
            raise ValueError(f"entries: {entry.name}: teacher: there is no entry {lender!r}")
        if read_entry(lender, self.entries[lender]).teacher is None:
            raise ValueError(f"entries: {entry.name}: teacher: the entry {lender!r} has no teacher of its own")

    def _check_pairs(self) -> None:
        if self.pairs is None:
            return
        if self.pairs.keys() != {"teachers", "students"}:
            raise ValueError(f"pairs must hold 'teachers' and 'students', holds {sorted(self.pairs)}")
        if self.subtracted is None:
            raise ValueError(f"pairs are compared with the student alone: add {ALONE!r} to modes, or name a baseline")
        if self.equal_seconds(DISTILLED) is not None:
            raise ValueError(
                f"pairs are {DISTILLED}, and have no runs of other modes to take the seconds of: give another mode "
                f"than {DISTILLED} {EQUAL_SECONDS_WITH}"
            )
        for part, names in self.pairs.items():
            _refuse_repetition(f"pairs: {part}", names)
            for name in names:
                if name not in self.entries:
                    raise ValueError(f"pairs: {part}: there is no entry {name!r}")
        for name in self.pairs["teachers"]:
            if self.entry(name).teacher_entry != name:
                raise ValueError(f"pairs: teachers: the entry {name!r} has no teacher of its own")


@dataclass(frozen=True)
class EqualSeconds:
    """What decides how long the runs of a mode are.

    Attributes:
        same_as: the mode whose options they have, but for the steps.
        other: the mode whose runs they are to take as many seconds as.
    """

    same_as: str
    other: str


@dataclass(frozen=True)
class Entry:
    """One row of a comparison.

    Attributes:
        name: of the entry, or "teacher→student" of a pair.
        options: of its teacher and its students.
        student: options of its students.
        teacher: options of the run that trains the teacher, or a checkpoint's folder or Hub id; None without one.
        teacher_entry: the entry whose teacher that is, its own by default; None without one.
        student_entry: the entry whose student this is, of a pair; else None.
    """

    name: str
    options: dict
    student: dict
    teacher: dict | str | None
    teacher_entry: str | None
    student_entry: str | None = None


def read_entry(name: str, content: dict) -> Entry:
    """An entry as the file has it; the teacher of another entry is not looked up, and None here.

    Raises:
        ValueError: the name, a key or a value cannot be used; the message names it.
    """
    _check_name("entries", name)
    place = f"entries: {name}"
    if unknown := sorted(map(str, content.keys() - {"options", "teacher", "student"})):
        raise ValueError(f"{place}: unknown key {unknown[0]!r}: an entry holds 'student', 'teacher' and 'options'")
    if "student" not in content:
        raise ValueError(f"{place}: there is no 'student': give its options, for example {{model_config: FILE}}")
    options, student, teacher = content.get("options", {}), content["student"], content.get("teacher")
    for part, value in (("options", options), ("student", student)):
        _check_options(f"{place}: {part}", value)
    if isinstance(teacher, dict) and "entry" in teacher:
        if teacher.keys() != {"entry"} or not isinstance(teacher["entry"], str):
            raise ValueError(
                f"{place}: teacher: give {{entry: NAME}} alone, options, or a checkpoint, not {teacher!r}"
            )
        return Entry(name, options, student, None, teacher["entry"])
    if teacher is not None and not isinstance(teacher, str):
        _check_options(f"{place}: teacher", teacher)
    return Entry(name, options, student, teacher, None if teacher is None else name)


def _check_options(place: str, options: object) -> None:
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{place} must hold options by name, holds {options!r}")
    if given := [name for name in SET_BY_THE_COMPARISON if name in options]:
        raise ValueError(f"{place}: leave out {given[0]!r}: every run of a comparison gets its own")


def _check_name(place: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{place}: {name!r} is to name a folder: use letters, digits, '_', '-' and '.'")


def _check_seeds(seeds: list[int], teacher_seeds: list[int]) -> None:
    for name, values in (("seeds", seeds), ("teacher_seeds", teacher_seeds)):
        if not values or min(values) < 0:
            raise ValueError(f"{name} is {values}: give at least one, each at least 0")
        _refuse_repetition(name, values)
    if len(teacher_seeds) > 1 and set(teacher_seeds) != set(seeds):
        raise ValueError(f"teacher_seeds is {teacher_seeds}: give one for all, or the seeds {seeds} themselves")


def _refuse_repetition(place: str, values: Iterable) -> None:
    if repeated := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{place}: {repeated[0]!r} is given twice")
