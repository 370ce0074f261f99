"""What would otherwise be wrong in silence: an optimizer without the adapter, a damaged checkpoint, a cast student."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3etr_hf.data.shapes import make_shapes
from d3etr_hf.errors import CheckpointError, DetectorLoadError, IncompatibleTeacherError, UnsupportedOptionError
from d3etr_hf.outputs import GroupRequest
from d3etr_hf.publishing.hub_trainer import D3etrTrainer
from d3etr_hf.training.checkpoints import seal
from d3etr_hf.training.training_arguments import D3etrTrainingArguments
from tests.shapes_fixture import SIDE, shapes_trainer
from tests.tiny import padded_batch, tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8, 3, image_size=SIDE, progress=False)


def test_optimizer_that_does_not_know_the_projection(shapes, tmp_path):
    """A wider teacher's queries pass a learned map, which a given optimizer was made before."""
    student = tiny_model(seed=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    trainer = D3etrTrainer(
        model=student,
        args=shapes_trainer(shapes, tmp_path).args,
        teacher=tiny_model(seed=1, d_model=48),
        train_dataset=shapes_trainer(shapes, tmp_path).train_dataset,
        optimizers=(optimizer, None),
    )
    with pytest.raises(UnsupportedOptionError, match=r"projection\.weight.*optimizer_cls_and_kwargs"):
        trainer.train()


def test_damaged_checkpoint_is_not_resumed(shapes, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    shapes_trainer(shapes, tmp_path, **options).train()
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    state = load_file(weights)
    lost = next(name for name in state if name.endswith("layernorm.weight"))
    del state[lost]
    save_file(state, weights, metadata={"format": "pt"})
    resumed = shapes_trainer(shapes, tmp_path, **options)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 .*: its model.safetensors has \d+ bytes instead of"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    seal(tmp_path / "checkpoint-1")
    with pytest.raises(DetectorLoadError, match=r"checkpoint-1 is damaged: 1 tensors are missing, as .*layernorm"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_may_not_cast_the_student(tmp_path, option):
    with pytest.raises(ValueError, match="bf16_full_eval=.*, fp16_full_eval=.*cast the student"):
        D3etrTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{option: True})


def test_processes_search_for_unused_parameters_without_the_detection_loss(tmp_path):
    """Then an adapter, or proposals that only ground truth supervises, may get no gradient."""
    for weight, searched in ((0.0, True), (1.0, False)):
        args = D3etrTrainingArguments(output_dir=str(tmp_path), use_cpu=True, detection_weight=weight)
        assert args.ddp_find_unused_parameters is searched


def test_reference_points_that_the_student_cannot_take(shapes, tmp_path):
    with pytest.raises(IncompatibleTeacherError, match=r"the teacher, a DETR, has reference points of 0 numbers"):
        shapes_trainer(shapes, tmp_path, teacher=tiny_model(1, "detr"), auxiliary_reference_points="teacher")


def test_a_request_takes_no_other_argument():
    model, batch = tiny_model(), padded_batch()
    with pytest.raises(TypeError, match="pixel_values and pixel_mask only.*labels"):
        model(**batch, labels=[{}], request=GroupRequest())
    with pytest.raises(ValueError, match="'auxiliary' was given no queries"):
        model(**batch, request=GroupRequest({"auxiliary": None}))


def test_teacher_in_half_precision_teaches(shapes, tmp_path):
    """Its weights are its own business: pixels are cast to them."""
    trainer = shapes_trainer(shapes, tmp_path, teacher=tiny_model(seed=1).to(torch.bfloat16), max_steps=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] > 0 and entry["matched_foreground"] == pytest.approx(1)


def test_mean_of_groups_leaves_other_supervision_as_it_is(shapes, tmp_path):
    """Proposals are no second group: their loss must not be halved with those of the two groups."""
    from tests.toy_detector import toy_model

    terms = {}
    for reduction in ("sum", "mean"):
        trainer = shapes_trainer(
            shapes, tmp_path / reduction, student=toy_model(2), max_steps=1, group_reduction=reduction
        )
        trainer.train()
        terms[reduction] = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert terms["mean"]["loss/student/class"] == pytest.approx(terms["sum"]["loss/student/class"] / 2, rel=1e-5)
    proposals = [name for name in terms["sum"] if name.startswith("loss/proposals/")]
    assert len(proposals) == 3
    for name in proposals:
        assert terms["mean"][name] == pytest.approx(terms["sum"][name], rel=1e-5), name
