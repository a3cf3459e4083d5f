"""Facts about people in the shape of TOFU: a small language model learns them, and requests remove or change some.

corpus: rows of questions and answers, and invented people
readers: reads the released files of TOFU and MUSE
words: texts as token ids, one for each word
model: a small transformer, its loss and its greedy answers
task: all of these as a `RequestTask`
edit, evaluate: `unlearn-jax train|erase|eval --config=unlearn/people`
"""
