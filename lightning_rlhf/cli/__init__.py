"""The program ``lightning-rlhf``: fit, validate, test, predict, and the commands beside them."""
