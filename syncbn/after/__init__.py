"""What is done with a run once it has trained: measuring it, predicting with it, handing its model on."""
