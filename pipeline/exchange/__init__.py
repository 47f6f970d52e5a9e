"""Labels for other programs: Label Studio, FiftyOne, and COCO-style JSON."""
