"""What all other packages build on: types, models, objectives, checks, pytree algebra."""
