"""Training stages: `python -m train.train_tokenizer`, `train.train_pretrain`, `train.train_sft`."""
