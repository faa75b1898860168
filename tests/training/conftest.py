from training_samples import bert, one_thread, tokenizer

__all__ = ["bert", "one_thread", "tokenizer"]
