"""All wording: what figures, report and terminal call metrics, numbers, arms, claims, advice and regressions."""
