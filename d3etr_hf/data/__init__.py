from d3etr_hf.data.collate import DetectionCollator
