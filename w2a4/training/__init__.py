"""Training a quantised LLaMA: `prepare`, any trainer, `convert`; and the trainer of `w2a4 train`."""
