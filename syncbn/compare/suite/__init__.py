"""All studies together: the tiers that they run in, the ledger of their outcomes, the page of their results."""
