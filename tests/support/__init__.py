"""What tests share: models, arguments, oracles, and programs that tests start."""
