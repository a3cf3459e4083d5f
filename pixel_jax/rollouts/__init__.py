"""Policy meets pixels: prompts, the decode loop, what calls come to, and the records of it all."""
