"""One file per way of training: a `Config`, and `main(config, ...)`."""
