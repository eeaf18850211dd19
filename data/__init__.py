"""Everything between a file on disk and a tensor, and a folder for each data set.

text       tokenizers, templates, prompt styles: turns to token ids and places of media, tokens to answers
media      pictures, sounds and tables to tensors, as each encoder takes them; a cache of encoder outputs
records    LLaVA's JSON, JSONL and texts to samples
batches    samples to the micro-batches of each training step
released   checkpoints of others, read as if they were ours
convert    python -m data.released IN OUT: checkpoints for others, and in another precision
scores     exact match, error rates, long-term forecasting
ablate     python -m data.ablate NAME: the papers' tables
long       python -m data.ablate long: time and memory by the prompt's length, beside a Transformer
"""
