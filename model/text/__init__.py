"""Text in, text out: tokenizer, chat template, sampling."""
