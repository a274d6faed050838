"""A sweep: one run in every combination of some settings, ranked by the measure that its task decides by."""
