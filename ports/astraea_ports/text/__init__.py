"""Text: tokenizer, T5 and UMT5 encoders, embeddings kept on disk."""
