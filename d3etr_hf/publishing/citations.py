"""What a card cites, in BibTeX."""

from d3etr_hf.publishing.card_texts import learned_parts

D3ETR = """\
@inproceedings{chen2024d3etr,
  title={D$^3$ETR: Decoder Distillation for Detection Transformer},
  author={Chen, Xiaokang and Chen, Jiahui and Liu, Yan and Tang, Jiaxiang and Zeng, Gang},
  booktitle={Proceedings of the International Joint Conference on Artificial Intelligence (IJCAI)},
  pages={668--676},
  year={2024},
  doi={10.24963/ijcai.2024/74}
}"""

GROUP_DETR = """\
@inproceedings{chen2023group,
  title={Group {DETR}: Fast {DETR} Training with Group-Wise One-to-Many Assignment},
  author={Chen, Qiang and Chen, Xiaokang and Wang, Jian and Zhang, Shan and Yao, Kun and Feng, Haocheng and
    Han, Junyu and Ding, Errui and Zeng, Gang and Wang, Jingdong},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year={2023}
}"""

# by the option whose value above 0 says that a run used the method
BASELINES = {
    "shared_query_weight": """\
@inproceedings{wang2024kddetr,
  title={{KD-DETR}: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling},
  author={Wang, Yu and Li, Xin and Weng, Shengzhao and Zhang, Gang and Yue, Haixiao and Feng, Haocheng and
    Han, Junyu and Ding, Errui},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}""",
    "logits_distillation_weight": """\
@inproceedings{chang2023detrdistill,
  title={{DETRDistill}: A Universal Knowledge Distillation Framework for {DETR}-families},
  author={Chang, Jiahao and Wang, Shuo and Xu, Hai-Ming and Chen, Zehui and Yang, Chenhongyi and Zhao, Feng},
  booktitle={IEEE/CVF International Conference on Computer Vision},
  year={2023}
}""",
    "matching_score_threshold": """\
@inproceedings{dong2023incremental,
  title={{Incremental-DETR}: Incremental Few-Shot Object Detection via Self-Supervised Learning},
  author={Dong, Na and Zhang, Yongqiang and Ding, Mingli and Lee, Gim Hee},
  booktitle={AAAI Conference on Artificial Intelligence},
  year={2023}
}""",
    "denoising_groups": """\
@inproceedings{li2022dn,
  title={{DN-DETR}: Accelerate {DETR} Training by Introducing Query DeNoising},
  author={Li, Feng and Zhang, Hao and Liu, Shilong and Guo, Jian and Ni, Lionel M. and Zhang, Lei},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}""",
    "one_to_many_queries": """\
@inproceedings{jia2023detrs,
  title={{DETRs} with Hybrid Matching},
  author={Jia, Ding and Yuan, Yuhui and He, Haodi and Wu, Xiaopei and Yu, Haojun and Lin, Weihong and Sun, Lei and
    Zhang, Chao and Hu, Han},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2023}
}""",
}

TRANSFORMERS = """\
@inproceedings{wolf2020transformers,
  title={Transformers: State-of-the-Art Natural Language Processing},
  author={Wolf, Thomas and others},
  booktitle={Proceedings of the Conference on Empirical Methods in Natural Language Processing: System Demonstrations},
  year={2020}
}"""

CODECARBON = """\
@software{codecarbon,
  title={CodeCarbon: Estimate and Track Carbon Emissions from Machine Learning Computing},
  author={Courty, Benoit and Schmidt, Victor and others},
  url={https://github.com/mlco2/codecarbon}
}"""


def citations_for(metrics: dict) -> list[str]:
    """The papers behind what a run used, from `metrics.json`."""
    training = metrics["training"]
    options = training["options"]
    used = [D3ETR] if options["auxiliary_queries"] == "teacher" or learned_parts(options) else []
    used += [metrics[role]["family"]["citation"] for role in ("student", "teacher") if role in metrics]
    if options["auxiliary_queries"] == "learned":
        used.append(GROUP_DETR)
    used += [citation for name, citation in BASELINES.items() if options.get(name, 0) > 0]
    used.append(TRANSFORMERS)
    if "energy" in training:
        used.append(CODECARBON)
    return list(dict.fromkeys(filter(None, used)))
