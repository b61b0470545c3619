"""What a run is, its settings in `config.toml`, and how its model, data and Estimator are made."""
