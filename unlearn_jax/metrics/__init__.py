"""Measures of unlearning: against retraining, and against an attacker.

tokens: log-probabilities of target tokens, and KL to another model, from logits. It runs on the accelerator; the other modules
    compute on the NumPy arrays that it returns
answers: probability of an answer (truth ratio, forget quality, model utility), and the share of it that the model reproduces
text: ROUGE-L of generated texts
membership: whether unlearned examples can be told from unseen ones (loss, min-k, zlib; AUC, PrivLeak)
distance: of two adapters in the weights they change
recommendation: AUC of Yes against No, by TALLRec's code and directly; hit ratio and valid ratio of LLaRA
"""
