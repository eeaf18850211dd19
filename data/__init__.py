"""Everything between a file on disk and a tensor, and a folder for each data set.

text       tokenizers, templates, prompt styles: turns to token ids and places of media
media      pictures, sounds and tables to tensors, as each encoder takes them; a cache of encoder outputs
records    LLaVA's JSON, JSONL and texts to samples
batches    samples to the micro-batches of each training step
released   checkpoints of others, read as if they were ours
convert    python -m data.released IN OUT: checkpoints for others, and in another precision
answers    tokens to answers; the questions of records, answered in batches
scores     exact match, error rates, long-term forecasting
ablate     python -m data.ablate NAME: the papers' tables
flags      command-line flags, and what --device and --dtype name
long       python -m data.ablate long: time and memory by the prompt's length, beside a Transformer
"""
