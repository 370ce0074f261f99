"""How much a matching changes between two visits of an image (DN-DETR's instability), while a student trains.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", CVPR 2022: with V_n the object that
query n is matched with in an epoch, or -1, the instability of an image is the number of queries whose V_n is another
in the next epoch. Here it is their share of the queries that have a partner at one of the two visits, in every decoder
layer, and a partner is an object or, in adaptive matching, a student's query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from d3etr_hf.data.sampling import mixed
from d3etr_hf.matching import MatchedPairs

# images that are followed, of a larger data set: with 6 layers and 300 queries each takes up to 14 kB
MOST_IMAGES = 5_000
ADAPTIVE = "adaptive"
OWN_ASSIGNMENT, AUXILIARY_ASSIGNMENT, TEACHER_ASSIGNMENT = "own", "auxiliary_own", "teacher_given"
CHANGED, COMPARED = "changed", "compared"
INSTABILITY = "instability"


def partners_of(pairs: MatchedPairs, teacher_queries: int) -> torch.Tensor:
    """int64 `(L, B, N_t)`: the student's query that each of the teacher's is matched with, -1 where there is none."""
    partners = pairs.student.new_full((*pairs.teacher.shape[:2], teacher_queries), -1)
    student = pairs.student if pairs.counted is None else torch.where(pairs.counted, pairs.student, -1)
    return partners.scatter_(-1, pairs.teacher, student)


@dataclass(frozen=True)
class Visit:
    """What one of a batch's images looked like to the training.

    Attributes:
        image_id: its id in the data set.
        objects: how many its ground truth has, which augmentation may have cut.
        epoch: from 0.
    """

    image_id: int
    objects: int
    epoch: int


@dataclass
class Instability:
    """Compares each visit of an image with the one in the epoch before, as far as this process had both.

    With several processes and a new order every epoch an image may have gone to another one: then it is not compared,
    so that each figure is of consecutive visits, if of fewer. Where a visit has another number of objects than the
    last, queries of ground truth are not compared, for one object could be taken for another. Nothing is saved: a run
    that goes on compares again from its second epoch on.

    Args:
        images: of the data set, those without labels among them; of more than `MOST_IMAGES` about so many are
            followed, the same on all processes.
    """

    images: int
    # by image and kind, the last epoch, its number of objects and int16 `(L, N)`
    _seen: dict[tuple[int, str], tuple[int, int, np.ndarray]] = field(default_factory=dict)

    def compare(self, visits: Sequence[Visit], partners: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Remember a batch, and count what has changed.

        Args:
            visits: of its images, in order.
            partners: by kind int64 `(L, B, N)`, each query's partner or -1.

        Returns:
            By "changed/kind/layer_k" and "compared/kind/layer_k" numbers of queries, float32 on the CPU; nothing where
            no image could be compared.
        """
        counts: dict[str, np.ndarray] = {}
        followed = [place for place, visit in enumerate(visits) if self._follows(visit.image_id)]
        for kind, of_batch in partners.items():
            found = of_batch[:, followed].to("cpu", torch.int16).numpy()
            for place, now in zip(followed, found.swapaxes(0, 1), strict=True):
                visit, key = visits[place], (visits[place].image_id, kind)
                epoch, objects, before = self._seen.get(key, (None, None, None))
                self._seen[key] = visit.epoch, visit.objects, now.copy()
                if epoch != visit.epoch - 1 or (kind != ADAPTIVE and objects != visit.objects):
                    continue
                held = (now >= 0) | (before >= 0)
                for name, queries in ((CHANGED, held & (now != before)), (COMPARED, held)):
                    counts[f"{name}/{kind}"] = counts.get(f"{name}/{kind}", 0) + queries.sum(-1)
        return {
            f"{name}/layer_{k}": torch.tensor(float(count))
            for name, layers in counts.items()
            for k, count in enumerate(layers)
        }

    def _follows(self, image_id: int) -> bool:
        return self.images <= MOST_IMAGES or mixed(image_id, 3) % self.images < MOST_IMAGES


def shares_of(counts: Mapping[str, float]) -> dict[str, float]:
    """From sums or means of what `compare` returns: by "instability/kind/layer_k" the share of queries, 0..1."""
    compared = {
        name.removeprefix(f"{COMPARED}/"): count for name, count in counts.items() if name.startswith(f"{COMPARED}/")
    }
    return {
        f"{INSTABILITY}/{name}": counts[f"{CHANGED}/{name}"] / count for name, count in compared.items() if count > 0
    }


def logged_instability(history: Sequence[Mapping]) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """What a run has logged: by kind and decoder layer the steps and the shares of queries, 0..1.

    Args:
        history: the run's `trainer.state.log_history`.
    """
    found: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for entry in history:
        for name, share in entry.items():
            prefix, _, rest = name.partition("/")
            if prefix == INSTABILITY:
                kind, _, layer = rest.partition("/layer_")
                found.setdefault(kind, {}).setdefault(int(layer), []).append((entry["step"], share))
    return found
