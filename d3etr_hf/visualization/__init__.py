"""Everything that draws: detections, attention, training curves."""
