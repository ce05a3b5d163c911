"""The Matryoshka format, what a loaded model is made of, and the files that weights and tokenizers come from."""
