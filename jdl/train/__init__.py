"""The Estimator and the parts it is made of."""
