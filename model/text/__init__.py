"""The text side of the model: tokenizer, chat template and sampling."""
