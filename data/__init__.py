"""Everything between a file on disk and a tensor: text, records, media, checkpoints of others, scores, the papers' tables; a folder for each data set."""
