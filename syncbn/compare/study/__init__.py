"""A study: what it declares, how its trials run, what they record, and the summary made of them."""
