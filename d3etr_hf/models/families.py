"""The families of detectors that can be students and teachers, by what Transformers calls them."""

from typing import Any

from d3etr_hf.errors import DetectorLoadError, quoted
from d3etr_hf.models.conditional_detr import D3etrConditionalDetrForObjectDetection
from d3etr_hf.models.d_fine import D3etrDFineForObjectDetection
from d3etr_hf.models.dab_detr import D3etrDabDetrForObjectDetection
from d3etr_hf.models.deformable_detr import D3etrDeformableDetrForObjectDetection
from d3etr_hf.models.deimv2 import D3etrDeimv2ForObjectDetection
from d3etr_hf.models.detector import Detector
from d3etr_hf.models.detr import D3etrDetrForObjectDetection
from d3etr_hf.models.lw_detr import D3etrLwDetrForObjectDetection
from d3etr_hf.models.rf_detr import D3etrRfDetrForObjectDetection
from d3etr_hf.models.rt_detr import D3etrRTDetrForObjectDetection
from d3etr_hf.models.rt_detr_v2 import D3etrRTDetrV2ForObjectDetection
from d3etr_hf.models.table_transformer import D3etrTableTransformerForObjectDetection

FAMILIES: dict[str, type[Detector]] = {
    "conditional_detr": D3etrConditionalDetrForObjectDetection,
    "deformable_detr": D3etrDeformableDetrForObjectDetection,
    "deimv2": D3etrDeimv2ForObjectDetection,
    "detr": D3etrDetrForObjectDetection,
    "lw_detr": D3etrLwDetrForObjectDetection,
    "rf_detr": D3etrRfDetrForObjectDetection,
    "dab-detr": D3etrDabDetrForObjectDetection,
    "d_fine": D3etrDFineForObjectDetection,
    "rt_detr": D3etrRTDetrForObjectDetection,
    "rt_detr_v2": D3etrRTDetrV2ForObjectDetection,
    "table-transformer": D3etrTableTransformerForObjectDetection,
}
# of a model_config that names none
DEFAULT_FAMILY = "conditional_detr"


def family_of_type(model_type: Any, what: str) -> type[Detector]:
    """The family that Transformers calls by this name.

    Args:
        model_type: the name, or whatever stands in its place.
        what: whose it is, as the error calls it.

    Raises:
        DetectorLoadError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise DetectorLoadError(
            f"{what} is a {quoted(model_type)} model; the families that can be students and teachers are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
