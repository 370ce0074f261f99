"""Takes every guard out, one at a time, in a copy of the repository, and sees that its test fails.

    python tests/mutations.py [WORD ...]

The notes are those of the project on what its stack does silently. Without words all mutations are tried (about twenty
minutes on one core), else those whose name holds one of them. Exits with 1 if a test still passes. Each line of the
table: what is guarded, file, what is taken out, what is put there, the test that must fail; tests/test_mutations.py
looks whether it can be tried.
"""

import shutil
import signal
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.fresh_process import FreshProcesses  # noqa: E402

SECONDS = 600  # that a test may take
MODELS = "d3etr_hf/models"
MODEL, ATTENTION = f"{MODELS}/conditional_detr.py", f"{MODELS}/group_attention.py"
DETECTOR, DENSE, DETR = f"{MODELS}/detector.py", f"{MODELS}/dense_memory.py", f"{MODELS}/detr.py"
TRAINER, OBJECTIVE = "d3etr_hf/training/trainer.py", "d3etr_hf/training/objective.py"
RESUMABLE = "d3etr_hf/training/resumable_trainer.py"
TEACHER, OPTIMIZATION = "d3etr_hf/training/teacher.py", "d3etr_hf/training/optimization.py"
GUARD, GUARD_TESTS = "d3etr_hf/training/non_finite.py", "tests/training/test_non_finite.py"
TERM_LOG, HALF_PRECISION = "d3etr_hf/training/term_log.py", "d3etr_hf/training/half_precision.py"
COSTS, LOSSES = "d3etr_hf/matching/solver.py", "d3etr_hf/losses"
DETECTION_LOSS, SCORES = f"{LOSSES}/detection_loss.py", "d3etr_hf/outputs/scores.py"
MODEL_TESTS, TRAINER_TESTS = "tests/models/test_conditional_detr.py", "tests/training/test_trainer.py"
CONTRACT, TOY_TESTS = "tests/models/test_contract.py", "tests/training/test_toy_detector.py"
HUB, HUB_TESTS = "d3etr_hf/publishing/upload.py", "tests/publishing/test_upload.py"
EVERY_TERM, LAUNCH_TESTS = "tests/training/test_every_term.py", "tests/training/test_launch.py"
INITIALISATION_TESTS, OBJECTIVE_TESTS = "tests/models/test_initialisation.py", "tests/training/test_objective.py"
HALF_TESTS = "tests/training/test_half_precision.py"
LOSS_TESTS = "tests/losses/test_detection_loss.py"
DISTRIBUTION_TESTS = "tests/losses/test_distribution_criterion.py"
BOX_DISTRIBUTION_TESTS = "tests/losses/test_box_distribution_distillation.py"
BOX_DISTRIBUTION_STEPS = (
    "tests/training/test_box_distributions.py::test_layers_are_the_mapped_ones_and_scores_the_weights"
)
DEFORMABLE, DEFORMABLE_TESTS = f"{MODELS}/deformable_detr.py", "tests/models/test_deformable_detr.py"
DAB, DAB_TESTS = f"{MODELS}/dab_detr.py", "tests/models/test_dab_detr.py"
OWN_ATTENTION, OWN_ATTENTION_TESTS = f"{MODELS}/own_attention.py", "tests/models/test_own_attention.py"

INPUTS, INPUTS_TESTS = "d3etr_hf/runs/inputs.py", "tests/runs/test_inputs.py"
OUTPUT_FOLDER, OUTPUT_FOLDER_TESTS = "d3etr_hf/runs/output_folder.py", "tests/runs/test_output_folder.py"
CHECKPOINTS, CHECKPOINT_TESTS = "d3etr_hf/training/checkpoints.py", "tests/training/test_checkpoints.py"
REPRODUCTION, MEMORY_GROWTH = "d3etr_hf/training/reproduction.py", "d3etr_hf/training/memory_growth.py"
HEARTBEAT, HEARTBEAT_TESTS = "d3etr_hf/training/heartbeat.py", "tests/training/test_heartbeat.py"
SIGNALS, SIGNAL_TESTS = "d3etr_hf/cli/signals.py", "tests/cli/test_signals.py"
PROBE, PROBE_TESTS = "d3etr_hf/training/step_probe.py", "tests/training/test_step_probe.py"
MUTATIONS = [
    # HF_NOTES 1: auxiliary_loss semantics, the norm on the side
    ("note 1: norm fed onwards", DENSE, "if normed_between:\n                hidden",
     "if True:\n                hidden",
     f"{MODEL_TESTS}::test_layer_predictions_are_normed_once_on_the_side"),
    ("note 1: checkpoint semantics", DENSE, "normed_between = self.model.decoder, self.config.auxiliary_loss",
     "normed_between = self.model.decoder, False", f"{MODEL_TESTS}::test_group_pass_equals_stock_forward"),
    ("note 1: earlier layers unnormed", DENSE, "per_layer.append(decoder.layernorm(hidden_states))",
     "per_layer.append(decoder.layernorm(hidden_states) if index + 1 == self.decoder_depth else hidden_states)",
     f"{MODEL_TESTS}::test_layer_predictions_are_normed_once_on_the_side"),
    # HF_NOTES 2: what is frozen
    ("note 2: after loading", DETECTOR, "        model.settle()\n", "",
     f"{INITIALISATION_TESTS}::test_resnet_freezes_stem_and_first_stage_when_built_and_when_loaded"),
    ("note 2: after building", DETECTOR, "            self.settle()\n", "",
     f"{INITIALISATION_TESTS}::test_resnet_freezes_stem_and_first_stage_when_built_and_when_loaded"),
    # HF_NOTES 3: start values
    ("note 3: initialisation", DETECTOR, "            self.initialise()\n", "",
     f"{INITIALISATION_TESTS}::test_first_class_loss_is_near_one"),
    ("note 3: of a new head", DETECTOR, "            model.initialise(new)\n", "",
     f"{INITIALISATION_TESTS}::test_new_class_head_of_a_loaded_model_starts_as_in_paper"),
    ("note 3: of a new head, DETR's too", DETECTOR, "            model.initialise(new)\n", "",
     f"{CONTRACT}::test_a_head_of_other_classes_starts_afresh[detr]"),
    # HF_NOTES 4: attention maps
    ("note 4: maps after dropout", ATTENTION, "return torch.matmul(weights.to(value.dtype), value), attention",
     "return torch.matmul(weights.to(value.dtype), value), AttentionMap(weights.log(), weights)",
     f"{MODEL_TESTS}::test_maps_are_taken_before_dropout"),
    ("note 4: mass on padding", ATTENTION, "masked_fill_(padding, -PADDING)", "masked_fill_(padding, -1.0)",
     f"{MODEL_TESTS}::test_maps_equal_stock_eager_maps"),
    ("note 4: reentrant checkpointing", DETECTOR, '.get("use_reentrant", False)', '.get("nothing", False)',
     f"{MODEL_TESTS}::test_reentrant_checkpointing_is_refused"),
    ("note 4: the groups' attention everywhere", ATTENTION, "    config = copy.copy(config)\n", "",
     f"{MODEL_TESTS}::test_only_what_is_asked_for_is_materialised"),
    # HF_NOTES 5: isolation
    ("note 5: groups not split in self-attention", ATTENTION,
     "seen = self.sees.get(name, (name,))", "seen = tuple(self.sizes)",
     f"{MODEL_TESTS}::test_group_isolation"),
    ("groups: maps of one group under the other's name", ATTENTION, "self.self_maps.append(maps)",
     "self.self_maps.append(dict(zip(maps, reversed(maps.values()), strict=True)))",
     f"{CONTRACT}::test_groups_do_not_see_each_other"),
    # HF_NOTES 6: the stock loss
    ("note 6: loss by name", DETECTOR, "        self.query_adapters = nn.ModuleDict()",
     '        self.query_adapters = nn.ModuleDict()\n        self.loss_type = "ForObjectDetection"',
     f"{MODEL_TESTS}::test_stock_loss_is_found"),
    # HF_NOTES 7: saving
    ("note 7: own class saved", DETECTOR, "def save_pretrained(", "def save_as_stock(",
     f"{MODEL_TESTS}::test_saved_checkpoint_is_a_plain_stock_model"),
    ("note 7: adapters saved with the student", DETECTOR,
     "        stock.save_pretrained(save_directory,",
     "        stock.query_adapters = self.query_adapters\n        stock.save_pretrained(save_directory,",
     f"{CONTRACT}::test_saved_model_is_a_plain_stock_checkpoint"),
    ("note 7: teacher left in train mode", TEACHER, "detector.eval().requires_grad_(False)",
     "detector.train().requires_grad_(False)", f"{TRAINER_TESTS}::test_teacher_is_frozen_and_kept_out_of_the_student"),
    ("note 7: teacher run in train mode", TEACHER, "            output = self.detector(",
     "            output = self.detector.train()(",
     f"{TRAINER_TESTS}::test_teacher_is_frozen_and_kept_out_of_the_student"),
    ("note 7: teacher's parameters train", TEACHER, "detector.eval().requires_grad_(False)", "detector.eval()",
     f"{TRAINER_TESTS}::test_teacher_is_frozen_and_kept_out_of_the_student"),
    # HF_NOTES 8: classes by name, dtype
    ("note 8: classes by position", TEACHER, "probabilities[..., self.class_index]",
     "probabilities[..., : len(self.class_index)]", f"{OBJECTIVE_TESTS}::test_teacher_classes_are_gathered_by_name"),
    ("note 8: dtype of the checkpoint", DETECTOR, '            kwargs.setdefault("dtype", torch.float32)\n',
     "            pass\n", f"{MODEL_TESTS}::test_half_precision_checkpoint_loads_in_float32"),
    # HF_NOTES 9, 10: the detection loss
    ("note 9: boxes divided twice", TRAINER, "return Shares(images, objects,",
     "return Shares(images, objects / self.accelerator.num_processes,",
     "tests/test_distributed.py"),
    ("note 9: boxes clamped to one after averaging", TRAINER,
     "torch.where(objects == 0, 1 / self.accelerator.num_processes, objects)", "objects.clamp(min=1)",
     "tests/test_distributed.py"),
    ("note 10: class weight", DENSE, "class_weight=config.cls_loss_coefficient", "class_weight=1.0",
     f"{OBJECTIVE_TESTS}::test_detection_weights_and_group_reduction"),
    # HF_NOTES 12: bad numbers
    ("note 12: NaN matched in silence", COSTS, "            if not tolerant:", "            if False:",
     "tests/matching/test_mix_matcher.py::test_non_finite_prediction_is_refused_with_its_place"),
    ("note 12: a step that is not finite goes on", GUARD, "torch.where(finite, 1.0, torch.nan)", "torch.ones(())",
     f"{TRAINER_TESTS}::test_nan_term_is_named"),
    ("note 12: a gradient that is not finite reaches the weights", GUARD, "torch.as_tensor(norm).isfinite():", "True:",
     f"{GUARD_TESTS}::test_a_gradient_that_is_not_finite_reaches_no_weight"),
    ("note 12: a skipped step moves weights", GUARD, "model.zero_grad(set_to_none=True)", "model.zero_grad",
     f"{GUARD_TESTS}::test_a_step_is_skipped_as_if_its_rate_had_been_zero"),
    ("note 12: batch norm keeps what a skipped step has counted", GUARD, "        self.undo()\n", "",
     f"{GUARD_TESTS}::test_nothing_of_a_skipped_step_stays_in_statistics_or_average"),
    ("note 12: a run that goes on may skip as many again", GUARD, "step <= state.global_step for step in steps", "[]",
     f"{GUARD_TESTS}::test_a_run_that_goes_on_has_skipped_what_it_had"),
    ("note 12: processes stop by what each has seen", GUARD,
     "reports = gather_object(own) if self.processes > 1 else own", "reports = own",
     f"{GUARD_TESTS}::test_processes_skip_and_stop_together"),
    ("what a run reads has changed", "d3etr_hf/runs/inputs.py", "    if changed:", "    if False:",
     "tests/cli/test_training_run.py::test_a_run_whose_inputs_have_changed_does_not_go_on"),
    ("note 12: boxes without area", "d3etr_hf/outputs/boxes.py", "tiny = 1e-9", "tiny = 0.0",
     f"{LOSS_TESTS}::test_identical_boxes_without_area_give_no_nan"),
    ("note 12: no box in a batch", f"{LOSSES}/detection_loss.py", "targets.class_labels.shape[1] == 0", "False",
     "tests/losses/test_detection_loss.py::test_batch_without_any_box_still_learns_background"),
    # HF_NOTES 13: evaluation
    ("note 13: default evaluation loop", TRAINER, "def prediction_step(", "def _unused_prediction_step(",
     f"{TRAINER_TESTS}::test_evaluation_equals_cocoeval_image_by_image"),
    # HF_NOTES 14: accumulation
    ("note 14: divided again", TRAINER, "self.loss_is_scaled_for_ga = True", "self.loss_is_scaled_for_ga = False",
     f"{TRAINER_TESTS}::test_accumulated_batches_equal_one_batch"),
    # HF_NOTES 15: the teacher under autocast
    ("note 15: teacher outside autocast", TEACHER, "        with autocast():", "        with torch.no_grad():",
     f"{TRAINER_TESTS}::test_teacher_runs_under_the_same_autocast"),
    # HF_NOTES 16: logs
    ("note 16: sums instead of means", TERM_LOG, "value / steps for name", "value for name",
     f"{TRAINER_TESTS}::test_logged_terms_add_up_to_the_loss"),
    ("note 16: one process's terms", TERM_LOG, "values = self.average(torch.stack(", "values = (torch.stack(",
     "tests/test_distributed.py::test_logged_terms_are_the_same_on_two_processes"),
    # HF_NOTES 18: padding
    ("note 18: no pixel mask", "d3etr_hf/data/collate.py",
     "torch.zeros(len(images), height, width, dtype=torch.int64)",
     "torch.ones(len(images), height, width, dtype=torch.int64)", "tests/data/test_collate.py"),
    ("note 18: boxes by another size", "d3etr_hf/data/transforms.py",
     "corners = boxes / torch.tensor([image.width, image.height, image.width, image.height])",
     "corners = boxes / torch.tensor([*original_size, *original_size]).flip(0)",
     "tests/data/test_transforms.py"),
    # HF_NOTES 19: the composition of a batch is kept when two processes or two models are compared
    ("note 19: padding seen by the decoder", MODEL, "encoder_attention_mask=memory.attention_mask",
     "encoder_attention_mask=torch.ones_like(memory.attention_mask)",
     f"{MODEL_TESTS}::test_group_pass_equals_stock_forward"),
    ("note 19: padding seen by the encoder", DENSE, "memory.attention_mask if fused",
     "torch.ones_like(memory.attention_mask) if fused", f"{MODEL_TESTS}::test_group_pass_equals_stock_forward"),
    # HF_NOTES 20: labels
    ("note 20: crowds as labels", "d3etr_hf/data/checking.py", 'if not annotation.get("iscrowd")]', "]",
     "tests/data/test_checking.py"),
    ("note 20: raw category ids", "d3etr_hf/data/checking.py",
     "{category_id: label for label, category_id in enumerate(category_ids)}",
     "{category_id: category_id for category_id in category_ids}", "tests/data/test_checking.py"),
    # found here
    ("resume: stock loading", RESUMABLE, "def _load_from_checkpoint(", "def _unused_load(",
     f"{TRAINER_TESTS}::test_resumed_run_equals_an_uninterrupted_one"),
    ("resume: auxiliary weights", RESUMABLE, "if extra.exists():", "if False:",
     f"{TRAINER_TESTS}::test_resumed_run_equals_an_uninterrupted_one"),
    ("best model: stock loading", RESUMABLE, "def _load_best_model(", "def _unused_best(",
     f"{TRAINER_TESTS}::test_best_model_is_loaded_at_the_end"),
    ("evaluation before training", TRAINER, "            self.model._is_accelerate_prepared = False\n",
     "            pass\n",
     "tests/test_distributed.py::test_first_gradients_are_the_same_on_two_processes"),
    ("matching: foreground chosen first", "d3etr_hf/matching/mix_matcher.py", "probabilities.amax(-1).topk(",
     "(-probabilities.amax(-1)).topk(",
     "tests/matching/test_mix_matcher.py::test_foreground_survives_a_smaller_student"),
    ("attention: renormalised rows", f"{LOSSES}/attention_distillation.py",
     "_block(attention.log, index).log_softmax(-1)",
     "_block(attention.log, index)",
     "tests/losses/test_attention_distillation.py"),
    ("attention: one float32 sum for whole maps", f"{LOSSES}/attention_distillation.py",
     "DOT_PIECE = 2**19", "DOT_PIECE = 2**40",
     "tests/losses/test_attention_distillation.py::test_small_divergence_of_large_maps_in_float32"),
    ("matching: threads mix up images", COSTS, "assignments[part::threads] = solved.result()",
     "assignments[threads - 1 - part :: threads] = solved.result()",
     "tests/matching/test_solver.py::test_threads_assign_as_a_loop_does"),
    ("matching: costs in chunks", "d3etr_hf/matching/matching_cost.py", "for chunk in chunks])",
     "for chunk in reversed(list(chunks))])", "tests/matching/test_solver.py::test_costs_do_not_depend_on_the_chunks"),
    ("note 8: a wider teacher's probabilities over all classes", TEACHER, "probabilities[..., :classes] if in_order",
     "probabilities if in_order", f"{OBJECTIVE_TESTS}::test_teacher_with_classes_beyond_the_students"),
    ("logs: learning rate of the backbone", OPTIMIZATION, "= {False: [], True: []}", "= {True: [], False: []}",
     f"{TRAINER_TESTS}::test_logged_learning_rate_is_not_the_backbones"),
    ("model: attention set in the backbone", ATTENTION, "config._attn_implementation_internal =",
     "config._attn_implementation =", f"{MODEL_TESTS}::test_backbone_with_attention_of_its_own"),
    ("imports: evaluate, which scripts/evaluate.py hides", TRAINER,
     "from d3etr_hf.evaluation import average_precision_of", "import evaluate\nfrom d3etr_hf.evaluation import "
     "average_precision_of", "tests/test_imports.py"),
    # HF_NOTES 21: what leaves for the Hub
    ("note 21: whole folder pushed", HUB, "allow_patterns=allowed, ", "",
     f"{HUB_TESTS}::test_only_the_allow_list_arrives_byte_by_byte"),
    ("note 21: pickles of a checkpoint", HUB, '"trained.safetensors", STATE)', '"optimizer.pt", STATE)',
     "tests/publishing/test_hub_trainer.py::test_hub_strategy"),
    ("publishing: secrets unread", HUB, "    refuse_secrets(paths, [token])\n    _QUEUE",
     "    _QUEUE",
     f"{HUB_TESTS}::test_secret_stops_everything_before_the_first_request"),
    ("publishing: as patient as the client", HUB, "except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:",
     "except ZeroDivisionError as error:", f"{HUB_TESTS}::test_silent_hub_is_waited_for_once"),
    ("publishing: pushed before the results are saved", "d3etr_hf/cli/training_run.py",
     "trainer.save_without_pushing()", "trainer.save_model()",
     "tests/publishing/test_hub_trainer.py::test_hub_that_fails_at_the_end"),
    ("publishing: paths of this machine", "d3etr_hf/publishing/card.py",
     "write_yaml(anonymise_configuration(configuration)", "write_yaml((configuration)",
     "tests/publishing/test_card.py::test_training_yaml_builds_the_run_again"),
    ("publishing: stale figures", "d3etr_hf/publishing/measurements.py",
     'known is None or known["weights"] != hash_of_weights(folder)', "known is None",
     "tests/publishing/test_measurements.py::test_measured_once"),
    ("publishing: results of an earlier training", "d3etr_hf/publishing/hub_trainer.py",
     'results.get("weights") == hash_of_weights(folder)', "True",
     "tests/publishing/test_hub_trainer.py::test_push_after_another_training"),
    ("publishing: options of an earlier version", "d3etr_hf/publishing/run_folder.py",
     "for name in RENAMED_OPTIONS if name in configuration", "for name in ()",
     "tests/publishing/test_measurements.py::test_options_of_an_earlier_version_are_named"),
    ("pictures: labels of another model's classes", "d3etr_hf/visualization/detections_on_images.py",
     "rows in found], index)", "rows in found], torch.arange(len(index)))",
     "tests/visualization/test_detections_on_images.py::test_models_with_permuted_classes_share_names_and_colours"),
    ("pictures: padding of the memory", "d3etr_hf/visualization/query_attention.py", "[:, :rows, :columns]", "",
     "tests/visualization/test_query_attention.py::test_maps_are_the_stock_model_s_without_the_padding"),
    ("pictures: every class of a softmax query", "d3etr_hf/visualization/query_attention.py",
     "order[values > -torch.inf]", "order",
     "tests/visualization/test_query_attention.py::test_a_family_with_softmax_and_no_reference_points"),
    ("ONNX: scores of every class of a softmax query", "d3etr_hf/publishing/onnx_export.py",
     "self.reading.probabilities(outputs.logits) * counts", "self.reading.probabilities(outputs.logits)",
     "tests/publishing/test_onnx_export.py::test_same_outputs_of_detr_with_resnet"),
    ("ONNX: an upright image does not fit", "d3etr_hf/publishing/onnx_export.py",
     "size.longest_edge / detector.side_divisor", "size.shortest_edge / detector.side_divisor",
     "tests/publishing/test_onnx_export.py::test_size_of_the_file"),
    ("ONNX: height for width", "d3etr_hf/publishing/onnx_export.py", "    return height, width\n",
     "    return width, height\n", "tests/publishing/test_onnx_export.py::test_size_of_the_file_is_height_and_width"),
    ("ONNX: a batch of one number", "d3etr_hf/publishing/onnx_export.py",
     "strict=not detector.exports_any_size", "strict=False",
     "tests/publishing/test_onnx_export.py::test_same_outputs_at_one_size"),
    # what the code computes at all: faults that no comparison of the code with itself can see
    ("terms: self-attention divided by boxes instead of images", OBJECTIVE,
     "group.self_attention, pairs, shares.images", 'group.self_attention, pairs, shares.detection[OWN]["l1"]',
     EVERY_TERM),
    ("terms: cross-attention divided by boxes instead of images", OBJECTIVE,
     "group.cross_attention, shares.images", "group.cross_attention, shares.objects", EVERY_TERM),
    ("terms: prediction divided by boxes", OBJECTIVE, "{name: shares.images * weight.shape[-1]",
     '{name: shares.detection[OWN]["l1"] * weight.shape[-1]', EVERY_TERM),
    ("terms: L1 and GIoU weights swapped in the adaptive matcher", OBJECTIVE,
     "AdaptiveMatcher(criterion.scores, *options.match_weights, ",
     "AdaptiveMatcher(criterion.scores, options.match_weights[0], *options.match_weights[:0:-1], ", EVERY_TERM),
    ("terms: L1 and GIoU weights swapped in the prediction loss", OBJECTIVE,
     "scores, costs = self.criterion.scores, self.options.match_weights\n        return",
     "scores, costs = self.criterion.scores, (self.options.match_weights[0], *self.options.match_weights[:0:-1])\n"
     "        return", EVERY_TERM),
    ("terms: L1 and GIoU weights swapped in the detection loss", DENSE,
     "l1_weight=config.bbox_loss_coefficient,\n        giou_weight=config.giou_loss_coefficient",
     "giou_weight=config.bbox_loss_coefficient,\n        l1_weight=config.giou_loss_coefficient", EVERY_TERM),
    ("terms: L1 and GIoU weights swapped in DETR's detection loss", DETR,
     "l1_weight=config.bbox_loss_coefficient,\n            giou_weight=config.giou_loss_coefficient",
     "giou_weight=config.bbox_loss_coefficient,\n            l1_weight=config.giou_loss_coefficient",
     f"{CONTRACT}::test_losses_equal_the_stock_loss"),
    ("terms: L1 and GIoU costs swapped in the label assignment", DENSE,
     "l1_cost=config.bbox_cost,\n        giou_cost=config.giou_cost",
     "giou_cost=config.bbox_cost,\n        l1_cost=config.giou_cost", EVERY_TERM),
    ("terms: L1 and GIoU costs swapped in DETR's label assignment", DETR,
     "l1_cost=config.bbox_cost,\n            giou_cost=config.giou_cost",
     "giou_cost=config.bbox_cost,\n            l1_cost=config.giou_cost",
     f"{CONTRACT}::test_the_configuration_weighs_costs_and_losses"),
    ("terms: the teacher's first layers taken whatever layer_map says", TEACHER,
     "self._aligned(group, self.layer_map), last", "self._aligned(group, list(range(len(self.layer_map)))), last",
     EVERY_TERM),
    ("terms: teacher's labels by layer_map instead of its last layer", TEACHER, "self._predicted(group, [-1])",
     "self._predicted(group, self.layer_map[-1:])", EVERY_TERM),
    ("terms: random queries weighed alike whatever the teacher sees", OBJECTIVE,
     'weights, totals = self._pair_weights(taught, pairs, shares, "boxes")',
     'weights, totals = self._pair_weights(taught, pairs, shares, "pairs")', EVERY_TERM),
    ("terms: negatives teach their class", "d3etr_hf/losses/hungarian_logits_distillation.py",
     "(~holds_object & counts) * boxes", "(~holds_object & counts) * (classes + boxes)", EVERY_TERM),
    ("matching: queries below the threshold in the way of others", "d3etr_hf/matching/mix_matcher.py",
     "cost = torch.where(confident, cost, 0)", "cost = torch.where(confident, cost, cost)", EVERY_TERM),
    ("denoising: places that are not used are seen", "d3etr_hf/training/denoising.py",
     "(used | ~used.any(-1, keepdim=True))[:, None, None]", "torch.ones_like(used)[:, None, None]", EVERY_TERM),
    ("denoising: queries that are not used are background", "d3etr_hf/training/denoising.py",
     "group.logits.masked_fill(unused, NO_CLASS)", "group.logits", EVERY_TERM),
    ("instability: any two visits compared", "d3etr_hf/training/instability.py", "epoch != visit.epoch - 1 or",
     "epoch is None or", "tests/training/test_instability.py::test_shares_equal_a_loop"),
    ("shared queries: the same ones every step", "d3etr_hf/training/shared_queries.py", "mixed(seed, step, 2)",
     "mixed(seed, 2)", "tests/training/test_shared_queries.py::test_random_queries_are_known_from_seed_and_step"),
    ("terms: pixel_mask left out of training, student and teacher", TRAINER,
     'for name in ("pixel_values", "pixel_mask")', 'for name in ("pixel_values",)', EVERY_TERM),
    ("terms: pixel_mask left out of training, teacher alone", TEACHER,
     'self.detector(pixel_values, pixels["pixel_mask"],', "self.detector(pixel_values, None,", EVERY_TERM),
    ("terms: pixel_mask left out of training, student alone", TRAINER, "model(**pixels,",
     'model(pixels["pixel_values"],', EVERY_TERM),
    ("terms: auxiliary_reference_points ignored", TRAINER,
     'self.distillation.auxiliary_reference_points == "student" and both_make_anchors', "both_make_anchors",
     EVERY_TERM),
    ("terms: no box in a batch divides by zero", TRAINER,
     "torch.where(objects == 0, 1 / self.accelerator.num_processes, objects)", "objects", EVERY_TERM),
    ("terms: auxiliary assignment is never the teacher's", OBJECTIVE,
     "given = group == AUXILIARY and self.options.teacher_assigns", "given = False",
     f"{OBJECTIVE_TESTS}::test_auxiliary_assignment"),
    ("terms: auxiliary assignment of each layer ignored", OBJECTIVE,
     'teacher.group if self.options.auxiliary_assignment == "teacher_per_layer" else teacher.last', "teacher.last",
     f"{OBJECTIVE_TESTS}::test_auxiliary_assignment"),
    ("terms: supervised predictions ignored", OBJECTIVE,
     "for name, part in self._supervised(student, targets).items():\n            weight",
     "for name, part in ():\n            weight",
     f"{OBJECTIVE_TESTS}::test_supervised_predictions_get_detection_terms_of_their_own"),
    ("terms: repeated objects counted once", OBJECTIVE, "part.repeats or 1", "1",
     f"{OBJECTIVE_TESTS}::test_supervised_predictions_get_detection_terms_of_their_own"),
    ("D-FINE: the last layer alone in evaluation", f"{MODELS}/d_fine.py",
     "training or self.going_on is not None", "training",
     "tests/models/test_d_fine.py::test_layers_in_evaluation_follow_from_the_hidden_states"),
    ("D-FINE: distributions of the layer before", f"{LOSSES}/distribution_criterion.py",
     "corners, holds_object = wide(group.box_distribution),",
     "corners, holds_object = wide(group.box_distribution).roll(1, 0),",
     f"{DISTRIBUTION_TESTS}::test_distribution_terms_go_with_the_predictions_of_their_layer"),
    ("D-FINE: boxes by each layer's own assignment", OBJECTIVE,
     "box_assignment = of_boxes[name].expand_as(assignment)", "box_assignment = assignment",
     "tests/training/test_distribution_losses.py::test_every_term_is_what_the_authors_train_with"),
    ("D-FINE: the union by the last layer", f"{LOSSES}/distribution_criterion.py",
     "most = votes.amax(0)", "most = votes[-1]", f"{DISTRIBUTION_TESTS}::test_the_union_is_what_most_layers_say"),
    ("DEIMv2: a shared box head under one name", f"{MODELS}/deimv2.py",
     "if not self.config.share_bbox_head", "if self.config is not None",
     "tests/models/test_deimv2.py::test_every_variant_is_saved_and_reduced"),
    ("box distributions: counted from the teacher's boxes", f"{LOSSES}/box_distribution_distillation.py",
     "(edge + bins * side - onto_edge) / onto_side.clamp(min=LEAST_SIDE)", "bins + 0 * edge",
     f"{BOX_DISTRIBUTION_TESTS}::test_equals_a_slow_loop"),
    ("box distributions: edges beyond the last bin count", f"{LOSSES}/box_distribution_distillation.py",
     "(within * divergence)", "divergence", f"{BOX_DISTRIBUTION_TESTS}::test_equals_a_slow_loop"),
    ("unions: counted on one process", OBJECTIVE, "*pairs, batch = shares.average(torch.stack([*counts, batch]))",
     "*pairs, batch = (torch.stack([*counts, batch]))",
     "tests/training/test_distribution_losses.py::test_pairs_are_counted_over_processes"),
    ("box distributions: the teacher's not softened", f"{LOSSES}/box_distribution_distillation.py",
     "target = carried ** (1 / temperature)", "target = carried",
     f"{BOX_DISTRIBUTION_TESTS}::test_where_both_count_alike_it_is_d_fines_own"),
    ("DETR: weight of no object ignored", DETECTION_LOSS,
     "torch.where(holds_object, 1.0, self.no_object_weight) * entropy", "entropy",
     f"{LOSS_TESTS}::test_cross_entropy_equals_slow_loop"),
    ("DETR: class term divided by the boxes", DETECTION_LOSS,
     ' | {"class": held + self.no_object_weight * (queries - held)}',
     "",
     f"{CONTRACT}::test_losses_equal_the_stock_loss"),
    ("DETR: more objects than queries", TRAINER, "min(count, queries)", "count",
     f"{TRAINER_TESTS}::test_more_objects_than_queries_are_counted_once"),
    ("DETR: several classes of one query are detections", SCORES,
     "return torch.full_like(ranking, -torch.inf).scatter(-1, best, ranking.gather(-1, best))", "return ranking",
     "tests/evaluation/test_detections.py::test_softmax_queries_are_one_detection_each"),
    ("heads: inside autocast", MODEL, "with without_autocast(memory.tokens):\n            hidden_states",
     "if True:\n            hidden_states", f"{CONTRACT}::test_predictions_leave_autocast_in_full_precision"),
    ("heads: inside autocast, DETR's", DETR, "with without_autocast(memory.tokens):\n            hidden_states",
     "if True:\n            hidden_states", f"{CONTRACT}::test_predictions_leave_autocast_in_full_precision"),
    ("heads: boxes left in bf16", DENSE, "wide(boxes)", "boxes",
     f"{CONTRACT}::test_predictions_of_a_model_in_half_precision_are_wide"),
    ("heads: reference points inside autocast", MODEL, "with without_autocast(memory.tokens):\n            own",
     "if True:\n            own", f"{CONTRACT}::test_predictions_leave_autocast_in_full_precision"),
    ("queries: static ones under autocast", MODEL, "with torch.no_grad(), without_autocast(",
     "with torch.no_grad(), torch.no_grad() or (", f"{CONTRACT}::test_static_queries_are_those_of_a_forward_pass"),
    ("queries: of another width taken as they are", f"{MODELS}/query_adapters.py",
     "return None if part is None else self.projection(part)", "return part",
     f"{CONTRACT}::test_queries_of_another_family_and_width_are_taken"),
    ("queries: anchors of an image made afresh", TRAINER,
     "both_make_anchors = self.model.makes_anchors and self.teacher.detector.makes_anchors",
     "both_make_anchors = True",
     f"{TOY_TESTS}::test_anchors_of_an_image_stay_with_their_queries"),
    ("queries: a teacher whose queries depend on the image is not run", TRAINER,
     "return reads_queries or options", "return options",
     f"{TOY_TESTS}::test_queries_alone_are_read_of_a_teacher_whose_queries_depend_on_the_image"),
    ("attention: groups of own attention left behind", OWN_ATTENTION,
     "                module.groups = None", "                pass",
     f"{OWN_ATTENTION_TESTS}::test_groups_are_gone_after_a_pass_even_one_that_failed"),
    ("attention: own attention without dropout", OWN_ATTENTION, "dropout if self.training else 0.0", "0.0",
     f"{CONTRACT}::test_dropout_falls_where_it_falls_in_the_stock_class"),
    ("attention: own attention's encoder sees padding", OWN_ATTENTION, ".masked_fill_(padding,",
     ".masked_fill_(padding & False,",
     f"{OWN_ATTENTION_TESTS}::test_memory_is_the_stock_encoders"),
    ("Deformable DETR: shares of padding rounded", DEFORMABLE, "return output.to(self.dtype)", "return output",
     f"{DEFORMABLE_TESTS}::test_shares_of_padding_are_exact"),
    ("Deformable DETR: places in the padded image", f"{MODELS}/group_decoder.py",
     " / valid_ratios[:, None, None, :, None]", "",
     f"{DEFORMABLE_TESTS}::test_places_are_in_the_unpadded_image"),
    ("Deformable DETR: proposals of every class", DEFORMABLE,
     "class_labels=torch.zeros_like(targets.class_labels)", "class_labels=targets.class_labels",
     f"{DEFORMABLE_TESTS}::test_proposals_are_supervised_as_objects_of_one_class"),
    ("Deformable DETR: another class chooses proposals", DEFORMABLE, "value[index] = value[: len(index)].clone()",
     "pass", f"{DEFORMABLE_TESTS}::test_classes_that_are_dropped_choose_the_same_proposals"),
    ("Deformable DETR: content for position", DEFORMABLE, "[..., : self.width]", "[..., self.width :]",
     f"{DEFORMABLE_TESTS}::test_a_position_that_two_stages_lack_is_made_of_the_boxes"),
    ("ties come apart in the stock model", DETECTOR, "if name in own and name != first", "if False and name != first",
     f"{DEFORMABLE_TESTS}::test_ties_are_the_stock_models_wherever_it_goes"),
    ("heads after the last layer inherit from a layer's", DETECTOR, "[*layer_map, teacher.decoder_depth]",
     "[*layer_map, layer_map[-1]]", f"{DEFORMABLE_TESTS}::test_heads_of_proposals_are_inherited_whichever_layers_are"),
    ("DAB-DETR: content of other families dropped", DAB,
     "zeros(len(queries), self.width) if content is None else content", "zeros(len(queries), self.width)",
     f"{DAB_TESTS}::test_a_further_group_is_what_stock_computes_of_its_queries"),
    ("DAB-DETR: refinement under autocast", DAB,
     "        with without_autocast(memory.tokens):\n            own", "        if True:\n            own",
     f"{CONTRACT}::test_predictions_leave_autocast_in_full_precision"),
    ("DAB-DETR: patterns and boxes in another order", DAB, "weight.repeat_interleave(self.config.num_queries, dim=0)",
     "weight.repeat(self.config.num_queries, 1)", f"{DAB_TESTS}::test_every_variant_equals_stock"),
    ("DAB-DETR: position projection of a later layer", DAB, "return name if first else", "return",
     f"{DAB_TESTS}::test_only_a_first_layer_projects_positions_for_cross_attention"),
    ("DAB-DETR: refinement and box head part", DETECTOR,
     "if name in own and name != first", "if False and name != first",
     f"{DAB_TESTS}::test_refinement_and_box_head_stay_one"),
    ("DAB-DETR: a tied parameter kept under another name", f"{MODELS}/initialisation.py", "if id(value) not in fresh",
     "if name not in chosen", f"{DAB_TESTS}::test_what_a_checkpoint_lacks_starts_afresh_under_either_of_its_names"),
    ("attention: sampled outside the image", "d3etr_hf/outputs/attention_maps.py", "torch.where(inside, share, 0)",
     "share", "tests/outputs/test_attention_maps.py"),
    ("attention: recomputed maps collected again", DENSE, "    groups.open = False\n", "",
     f"{MODEL_TESTS}::test_recomputed_maps_are_not_collected_again"),
    ("float16: skipped steps not counted", HALF_PRECISION, "        self.count += 1\n", "",
     f"{HALF_TESTS}::test_a_step_that_overflows_is_skipped_and_counted"),
    ("float16: skipped without end", HALF_PRECISION, "        self.in_a_row += 1\n", "",
     f"{HALF_TESTS}::test_a_run_that_skips_without_end_stops_with_the_reason"),
    ("float16: costs that are not finite refused", OBJECTIVE, "wait = start_solving(problems, self.tolerant) if",
     "wait = start_solving(problems) if", f"{HALF_TESTS}::test_a_step_that_overflows_is_skipped_and_counted"),
    ("float16: gradient norms left scaled", TRAINER, "(gradient / scale).square()", "gradient.square()",
     f"{HALF_TESTS}::test_gradient_norms_are_of_the_scaled_loss"),
    ("launch: FSDP goes on", "d3etr_hf/training/launch_checks.py", " or accelerator.distributed_type in UNSUPPORTED",
     "",
     f"{LAUNCH_TESTS}::test_sharding_is_refused_whoever_asked_for_it"),
    ("launch: buffers broadcast all the same", TRAINER, "args.ddp_broadcast_buffers = keeps_running_statistics(model)",
     "args.ddp_broadcast_buffers = True",
     f"{LAUNCH_TESTS}::test_buffers_are_broadcast_only_where_statistics_are_kept"),
    ("options: renamed ones accepted", "d3etr_hf/training/training_arguments.py",
     "for name in RENAMED_OPTIONS.keys() & kwargs.keys():\n            raise TypeError(",
     "for name in RENAMED_OPTIONS.keys() & kwargs.keys():\n            kwargs.pop(name)\n            print(",
     f"{OBJECTIVE_TESTS}::test_options_that_were_renamed_name_their_successor"),
    ("data: teacher sees the student's pixels", TEACHER, 'prefix = "teacher_" if', 'prefix = "" if',
     "tests/training/test_teacher_pixels.py::test_each_model_sees_its_own_pixels_and_learns"),
    ("data: attention to other pixels as it is", TRAINER, "teacher = teacher.on_memory(student.memory_mask)", "pass",
     "tests/training/test_teacher_pixels.py::test_attention_of_the_teacher_is_compared_on_the_students_grid"),
    ("data: a size for each image of a batch", "d3etr_hf/data/collate.py", "torch.stack(images), size=size",
     "torch.stack(images), size=sizes[0]", "tests/data/test_collate.py"),
    ("data: targets of other images", "d3etr_hf/data/collate.py", "pack(labels)", "pack(labels[::-1])",
     "tests/data/test_collate.py"),
    ("data: boxes packed in another order", "d3etr_hf/outputs/targets.py", 'row[:count, 1:] = label["boxes"]',
     'row[:count, 1:] = label["boxes"].flip(0)', "tests/outputs/test_targets.py"),
    ("evaluation: pixel_mask left out", "d3etr_hf/evaluation/detections.py",
     'batch["pixel_mask"], request', "None, request",
     f"{TRAINER_TESTS}::test_evaluation_equals_cocoeval_image_by_image"),
    ("evaluation: of other classes goes on", TRAINER,
     '        check_data(self.model, None, {"eval_dataset": dataloader.dataset})\n', "",
     f"{LAUNCH_TESTS}::test_another_data_set_is_checked_when_it_is_evaluated"),
    ("schedule: warmup removed under learning_rate_drop", OPTIMIZATION,
     "min(1.0, (step + 1) / max(1, warmup)) * ", "", f"{TRAINER_TESTS}::test_learning_rate_drops_once_to_a_tenth"),
    ("synchronisations: a mask read on the host", OBJECTIVE,
     "        options, groups = self.options, student.groups\n",
     "        options, groups = self.options, student.groups\n        student.memory_mask.any().item()\n",
     "tests/training/test_synchronisations.py::test_a_step_waits_three_times"),
    ("synchronisations: a number copied to the device", OBJECTIVE,
     "        options, groups = self.options, student.groups\n",
     "        options, groups = self.options, student.groups\n        student.memory_mask.new_tensor([True])\n",
     "tests/training/test_synchronisations.py::test_a_step_copies_little_to_the_device"),
    ("private names: another one", TRAINER, "self._created_lr_scheduler = True",
     "self._created_lr_scheduler = self.model.config._anything = True",
     "tests/test_private_names.py::test_every_private_name_is_in_the_table"),
    # what no comparison of values shows, or of equal settings
    ("varifocal: weights have a gradient", f"{LOSSES}/overlap_criteria.py", "logits.detach().sigmoid()",
     "logits.sigmoid()", "tests/losses/test_overlap_criteria.py::test_varifocal_equals_transformers"),
    ("D-FINE: boxes learn from what distributions weigh", f"{LOSSES}/distribution_criterion.py",
     "overlap = iou(group.boxes.detach(), objects)", "overlap = iou(group.boxes, objects)",
     f"{DISTRIBUTION_TESTS}::test_what_distributions_weigh_has_no_gradient"),
    ("attention: places teach the teacher", f"{LOSSES}/attention_geometry.py", "values_of(theirs.detach(), ours)",
     "values_of(theirs, ours)", "tests/losses/test_attention_geometry.py::"
     "test_gradient_is_finite_where_all_weight_is_on_one_place_and_the_students_alone"),
    ("terms: moments with the two memories' masks swapped", OBJECTIVE,
     "moment_distillation(theirs, ours, pairs, *masks, images)",
     "moment_distillation(theirs, ours, pairs, *masks[::-1], images)",
     f"{OBJECTIVE_TESTS}::test_everything_unequal_at_once"),
    ("terms: an accumulated batch's weights are the step's", OBJECTIVE, "total * shares.images / images for n, total",
     "total for n, total", f"{OBJECTIVE_TESTS}::test_a_batch_is_its_part_of_an_accumulated_step"),
    ("unions: an accumulated batch's pairs are the step's", OBJECTIVE, "of * shares.objects / batch, 1)", "of, 1)",
     "tests/training/test_distribution_losses.py::test_pairs_are_scaled_to_the_objects_of_the_step"),
    ("terms: the student's criterion assigns to the teacher", OBJECTIVE, "self.teacher_criterion.problem(",
     "self.criterion.problem(", f"{OBJECTIVE_TESTS}::test_the_teacher_assigns_by_its_own_costs"),
    ("terms: box distributions weighed as predictions are", OBJECTIVE,
     'self._pair_weights(teacher, pairs, shares, "boxes")',
     "self._pair_weights(teacher, pairs, shares, self.options.prediction_normaliser)", BOX_DISTRIBUTION_STEPS),
    ("terms: box distributions of the teacher's first layers", TEACHER,
     "torch.stack(chosen(group.box_distribution))", "group.box_distribution[: len(layers)]", BOX_DISTRIBUTION_STEPS),
    ("RT-DETR: the matcher's gamma in the class loss", f"{MODELS}/rt_detr.py",
     "background_gamma=config.focal_loss_gamma", "background_gamma=config.matcher_gamma",
     f"{CONTRACT}::test_losses_equal_the_stock_loss[rt_detr]"),
    ("costs: alpha of the focal loss", DETECTION_LOSS, "as_object = self.cost_alpha *", "as_object = self.alpha *",
     f"{CONTRACT}::test_the_configuration_weighs_costs_and_losses[conditional_detr]"),
    ("compare: who borrows a teacher takes the lender's options", "d3etr_hf/runs/comparison.py",
     "Entry(name, entry.options, entry.student, lender", "Entry(name, lender.options, entry.student, lender",
     "tests/runs/test_comparison.py::test_a_teacher_is_trained_borrowed_or_a_checkpoint"),
    ("compare: a pair takes the options of its teacher's entry", "d3etr_hf/runs/comparison.py",
     '→{student}", entry.options,', '→{student}", lender.options,',
     "tests/runs/test_comparison.py::test_pairs_take_the_student_of_one_and_the_teacher_of_the_other"),
    ("convert: dropout by default", f"{MODELS}/official_names.py", 'options.get("dropout", 0.1)', "0.1",
     "tests/cli/test_convert.py::test_converted_checkpoint_computes_the_same"),
    ("what trains: Deformable DETR's embedding of levels frozen", DEFORMABLE, "self.config.encoder_layers > 0)",
     "False)", f"{CONTRACT}::test_what_trains_gets_a_gradient_and_what_loads_trains_the_same[deformable_detr]"),
    ("classes kept: another row for queries that fill up", f"{MODELS}/sampled_memory.py",
     "index.new_tensor([module.num_embeddings - 1])", "index.new_tensor([0])",
     "tests/models/test_sampled_memory.py::test_classes_that_are_kept_keep_their_denoising_queries"),
    ("compare: one run more than workers", "d3etr_hf/runs/run_pool.py", "ready[: workers - len(running)]",
     "ready[: workers + 1 - len(running)]", "tests/runs/test_run_pool.py::test_no_more_run_at_once_than_workers"),
    ("unions: fgl divided by the objects", OBJECTIVE, "dict.fromkeys(self.criterion.box_terms, pairs[name])",
     "dict.fromkeys(('l1', 'giou'), pairs[name])",
     "tests/training/test_distribution_losses.py::test_pairs_are_counted_over_processes"),
    ("what trains: a backbone at rate zero", TRAINER, "model.freeze_part(BACKBONE)", "BACKBONE",
     f"{TRAINER_TESTS}::test_backbone_learning_rate_zero_freezes_it"),
    ("queries: of a teacher in half precision left as narrow", "d3etr_hf/outputs/groups.py",
     "else wide(part.detach())", "else part.detach()",
     "tests/outputs/test_groups.py::test_queries_know_their_number_and_detach"),
    ("queries: new boxes all in the middle", f"{MODELS}/sampled_memory.py", "torch.cat([torch.rand(count, 2), sides]",
     "torch.cat([torch.full((count, 2), 0.5), sides]", f"{CONTRACT}::test_new_queries_are_drawn_apart[rt_detr]"),
    ("queries: new ones of two stages without boxes", DEFORMABLE,
     "if self.config.two_stage:\n            return super().new_queries(count)", "if False:\n            pass",
     f"{DEFORMABLE_TESTS}::test_new_queries_of_two_stages_are_boxes"),
    ("queries: new ones all the same", DENSE, "Queries(position=torch.randn(count, self.width))",
     "Queries(position=torch.zeros(count, self.width))", f"{CONTRACT}::test_new_queries_are_drawn_apart[detr]"),
    ("schedule: the drop a step early", OPTIMIZATION, "drop = round(drop_at * steps)", "drop = int(drop_at * steps)",
     "tests/training/test_optimization.py::test_the_drop_is_at_the_nearest_step"),
    # a probe leaves no trace
    ("probe: random state", PROBE, "with torch.random.fork_rng([] if device.type == \"cpu\" else [device]):",
     "with contextmanager(lambda: iter([0]))():",
     f"{PROBE_TESTS}::test_a_training_is_the_same_with_and_without"),
    ("probe: buffers", PROBE, "buffer.copy_(buffers[name])", "pass",
     f"{PROBE_TESTS}::test_a_training_is_the_same_with_and_without"),
    ("probe: log", TRAINER, "                log.sums = sums\n", "                pass\n",
     f"{PROBE_TESTS}::test_a_training_is_the_same_with_and_without"),
    ("probe: gradients", TRAINER, "            self.model.zero_grad()\n", "",
     f"{PROBE_TESTS}::test_a_training_is_the_same_with_and_without"),
    # faults: what is compared, kept, undone, said
    ("inputs: shards are none of a checkpoint's files", INPUTS, '    "model-*-of-*.safetensors",\n', "",
     f"{INPUTS_TESTS}::test_every_file_of_a_checkpoint_counts"),
    ("inputs: the start model is not compared", INPUTS, '        "model to start from": model_arguments.model,\n', "",
     f"{INPUTS_TESTS}::test_everything_that_is_read_is_compared"),
    ("inputs: training images twice", INPUTS, "] = images_of(split)", "] = images_of(train)",
     f"{INPUTS_TESTS}::test_everything_that_is_read_is_compared"),
    ("inputs: a large teacher is known by its size", INPUTS, 'whole or not name.endswith("images")', "whole",
     f"{INPUTS_TESTS}::test_images_alone_may_be_too_many_to_be_hashed"),
    ("inputs: hash_images ignored", INPUTS, "known.get(name), whole or not", "known.get(name), not",
     f"{INPUTS_TESTS}::test_images_alone_may_be_too_many_to_be_hashed"),
    ("inputs: compared where a run begins", INPUTS, "    if checkpoint is None:\n        return {}\n", "",
     f"{INPUTS_TESTS}::test_damaged_fingerprints_are_refused_with_the_remedy"),
    ("inputs: names of classes do not count", "d3etr_hf/data/hub_datasets.py",
     'in ("images", "annotations", "categories"):', 'in ("images", "annotations"):',
     f"{INPUTS_TESTS}::test_classes_by_other_names_are_other_annotations"),
    ("folder: places are free in a finished run", OUTPUT_FOLDER, "if RESULTS not in names and INPUTS in names:",
     "if INPUTS in names:",
     f"{OUTPUT_FOLDER_TESTS}::test_data_at_another_place_is_the_same_only_where_its_content_is_compared"),
    ("folder: the best checkpoint is not looked at", OUTPUT_FOLDER, "newest_whole_checkpoint(output, with_best)",
     "newest_whole_checkpoint(output)",
     f"{OUTPUT_FOLDER_TESTS}::test_a_best_checkpoint_that_is_damaged_is_told_before_the_run_goes_on"),
    ("folder: precision of the launch unknown", OUTPUT_FOLDER, 'training_arguments.mixed_precision or "no"', '"no"',
     f"{OUTPUT_FOLDER_TESTS}::test_the_launch_is_described_by_what_it_is"),
    ("checkpoints: random state not needed", CHECKPOINTS, '"rng_state*.pth", ', "",
     f"{CHECKPOINT_TESTS}::test_a_checkpoint_that_lists_no_optimizer_or_the_like_is_none"),
    ("checkpoints: one put aside stays there", CHECKPOINTS, "    _take_back(output)\n", "",
     f"{CHECKPOINT_TESTS}::test_what_a_kill_left_put_aside_comes_back"),
    ("checkpoints: one put aside over a whole one", CHECKPOINTS,
     "        if (folder / MANIFEST).exists():\n            shutil", "        if False:\n            shutil",
     f"{CHECKPOINT_TESTS}::test_what_a_kill_left_put_aside_comes_back"),
    ("checkpoints: the best goes where a folder was moved", RESUMABLE,
     "best and str(checkpoint_beside(output, best))", "best",
     f"{CHECKPOINT_TESTS}::test_the_best_checkpoint_stays_where_the_folder_was_moved"),
    ("checkpoints: sealed before all have written", RESUMABLE,
     "            self.accelerator.wait_for_everyone()\n            if self.args.should_save:\n                torch",
     "            if self.args.should_save:\n                torch",
     f"{CHECKPOINT_TESTS}::test_two_processes_seal_one_checkpoint_and_choose_the_same"),
    ("note 12: statistics of the last accumulated batch", GUARD,
     "if not self._watched and self._keeps", "if self._keeps",
     f"{GUARD_TESTS}::test_nothing_of_a_skipped_step_stays_in_statistics_or_average"),
    ("note 12: a step of two processes counts twice", GUARD,
     "steps = {int(number) for number in numbers if number.isdecimal()}",
     "steps = [int(number) for number in numbers if number.isdecimal()]",
     f"{GUARD_TESTS}::test_a_step_that_two_processes_kept_is_one"),
    ("note 12: an evaluation keeps a step", GUARD,
     "        if not trainer.model.training:\n            return report\n", "",
     f"{TRAINER_TESTS}::test_nan_term_is_named"),
    ("note 12: every image is blamed", GUARD, "batch.image_ids[error.image : error.image + 1]", "batch.image_ids",
     f"{GUARD_TESTS}::test_where_a_nan_begins_is_found"),
    ("float16: the guard holds every batch", GUARD,
     "if it was skipped.\"\"\"\n        self.forget()", "if it was skipped.\"\"\"",
     f"{HALF_TESTS}::test_batch_norm_keeps_nothing_of_a_step_that_was_skipped"),
    ("float16: batch norm keeps what a skipped step has counted", HALF_PRECISION, "        self.undo()\n", "",
     f"{HALF_TESTS}::test_batch_norm_keeps_nothing_of_a_step_that_was_skipped"),
    ("kept step: the weight of detection by default", GUARD, '(*DISTILLATION_OPTIONS, "detection_weight", "seed")',
     "DISTILLATION_OPTIONS", f"{GUARD_TESTS}::test_a_kept_step_is_taken_again_bit_by_bit"),
    ("kept step: the queries of another step", REPRODUCTION, "kept.step - 1", "kept.step",
     f"{GUARD_TESTS}::test_a_kept_step_is_taken_again_bit_by_bit"),
    ("kept step: the accelerator is taken", REPRODUCTION, "            use_cpu=use_cpu,\n", "",
     "tests/training/test_non_finite.py::test_the_accelerator_is_left_alone_where_that_is_asked_for"),
    ("stop: a worker passes over later signals", "d3etr_hf/training/stopping.py",
     "if first[-1] - first[0] > HANDED_ON:", "if False:",
     "tests/training/test_stopping.py::test_a_second_signal_ends_a_worker_unless_it_was_handed_on"),
    ("kept step: gradients unread", REPRODUCTION, "found.gradients = _not_finite(", "_not_finite(",
     f"{GUARD_TESTS}::test_gradients_that_are_not_finite_are_found"),
    ("kept step: modules that were given NaN", REPRODUCTION, "if _finite((arguments, keywords)) and not", "if not",
     f"{GUARD_TESTS}::test_where_a_nan_begins_is_found"),
    ("probe: the guard keeps its batches", TRAINER,
     "            self.model.zero_grad()\n            self.guard.forget()\n", "            self.model.zero_grad()\n",
     f"{PROBE_TESTS}::test_a_training_is_the_same_with_and_without"),
    ("probe: batches that processes split", PROBE, " or self.trainer.accelerator.split_batches", "",
     f"{PROBE_TESTS}::test_a_training_that_is_short_compiled_or_told_so_has_no_probe"),
    ("probe: the peak of more than the batch", PROBE, "growth.peaks[state.train_batch_size]",
     "max(growth.peaks.values())", f"{PROBE_TESTS}::test_the_peak_is_of_the_trainings_own_batch"),
    ("probe: processes with all the memory each", MEMORY_GROWTH,
     'trainer.args.world_size if self.device.type == "cpu" else 1', "1",
     "tests/training/test_memory_growth.py"),
    ("heartbeat: everybody speaks", HEARTBEAT, " and speaker == self.rank:", ":", HEARTBEAT_TESTS),
    ("heartbeat: a silent rank is to speak", HEARTBEAT, "word != LEFT and self.missed[rank] < MISSED)",
     "word != LEFT)", HEARTBEAT_TESTS),
    ("heartbeat: one that left is missed", HEARTBEAT, "word == self.words[rank] and word != LEFT else",
     "word == self.words[rank] else", HEARTBEAT_TESTS),
    ("launch: sizes found by each process", "d3etr_hf/training/launch_checks.py",
     "if args.auto_find_batch_size and accelerator.num_processes > 1:", "if False:",
     f"{LAUNCH_TESTS}::test_launches_are_refused_by_what_they_are"),
    ("signals: a second one does nothing", SIGNALS, "if time.monotonic() - first_came > HANDED_ON:", "if False:",
     f"{SIGNAL_TESTS}::test_a_second_signal_ends_it_at_once_unless_it_was_handed_on"),
    ("signals: nohup's taken over", SIGNALS, " or previous[number] is not signal.SIG_IGN", " or True",
     f"{SIGNAL_TESTS}::test_what_nohup_ignores_stays_ignored"),
    ("signals: a fork does not end", SIGNALS, "if os.getpid() != process:", "if False:",
     f"{SIGNAL_TESTS}::test_a_fork_of_the_process_ends_as_any_other"),
    ("signals: the command of one machine of many", SIGNALS,
     '> int(os.environ.get("LOCAL_WORLD_SIZE", "1")):', "> 10**9:",
     f"{SIGNAL_TESTS}::test_no_command_is_told_of_several_machines"),
    ("trial: boxes that are not finite", f"{MODELS}/trial.py", " and torch.isfinite(own.boxes).all())", ")",
     "tests/models/test_trial.py::test_predictions_that_are_not_finite_are_refused"),
    ("trial: a new model is built at once", f"{MODELS}/new_models.py",
     "    build_on_meta(family, config, place)\n", "",
     "tests/models/test_trial.py::test_a_new_model_is_built_of_nothing_first"),
    ("fields: depth without bound", f"{MODELS}/field_values.py", " or depth > MOST_DEPTH:", ":",
     "tests/models/test_field_values.py::test_fields_of_other_names_have_bounds_too"),
    ("fields: other names have no bounds", f"{MODELS}/field_values.py", "aliases.get(name, name)", "name",
     "tests/models/test_field_values.py::test_fields_of_other_names_have_bounds_too"),
    ("largest: a teacher sees no crops", "d3etr_hf/data/largest.py",
     "None if crop is None else Augmentation(crop=crop)", "None",
     "tests/data/test_largest.py::test_a_teacher_sees_the_largest_crops_too"),
]  # fmt: skip


# what a fork of a process that has imported torch and Transformers runs, in the copy
RUN_TESTS = f"""
import os, signal, sys
import pytest
signal.alarm({SECONDS})
os.environ["PYTHONPATH"] = os.getcwd()
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def left_out(folder: str, names: list[str]) -> set[str]:
    """What of a folder is not copied; at the top alone, since the package has a room called runs."""
    hidden = {name for name in names if name.endswith("cache") or name == "__pycache__"}
    return hidden | ({".git", ".venv", "runs", "data"} & set(names) if Path(folder) == REPOSITORY else set())


def try_tests(processes: FreshProcesses, copy: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether tests pass, and what the first error says; one that takes too long fails."""
    result = processes.code(RUN_TESTS, *tests, cwd=copy)
    if result.returncode not in (0, 1, -signal.SIGALRM):  # 1: tests failed; anything else: they did not run
        raise SystemExit(f"{tests} could not be run:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    errors = [line.removeprefix("E").strip() for line in result.stdout.splitlines() if line.startswith("E  ")]
    return result.returncode == 0, next(iter(errors), "")


def passes_with(processes: FreshProcesses, copy: Path, mutation: tuple[str, str, str, str]) -> tuple[bool, str]:
    """Whether the test still passes with the guard taken out, and its error."""
    file, old, new, test = mutation
    path = copy / file
    original = path.read_text()
    path.write_text(original.replace(old, new))
    try:
        return try_tests(processes, copy, [test])
    finally:
        path.write_text(original)


def main() -> None:
    chosen = [row for row in MUTATIONS if not sys.argv[1:] or any(word in row[0] for word in sys.argv[1:])]
    for _, file, old, _, _ in chosen:
        if (REPOSITORY / file).read_text().count(old) != 1:
            raise SystemExit(f"{file} does not hold {old!r} once: bring tests/mutations.py up to date")
    survivors = []
    with tempfile.TemporaryDirectory() as folder, FreshProcesses() as processes:
        copy = Path(folder) / "repository"
        shutil.copytree(REPOSITORY, copy, ignore=left_out)
        passed, error = try_tests(processes, copy, sorted({row[-1] for row in chosen}))
        if not passed:
            raise SystemExit(f"a test is red without any mutation: {error}")
        print(f"the tests of {len(chosen)} mutations pass without them", flush=True)
        for name, *mutation in chosen:
            passed, error = passes_with(processes, copy, mutation)
            print(f"{'SURVIVED' if passed else 'caught':<9}{name}  ({mutation[-1]}): {error[:120]}", flush=True)
            survivors += [name] * passed
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
