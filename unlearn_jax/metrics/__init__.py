"""How well something was unlearned: against retraining, and against an attacker.

tokens: logits -> log-probability of target tokens; KL to another model. It runs on the accelerator; the rest are functions of
    the NumPy arrays that come out of it
answers: how likely an answer is (truth ratio, forget quality, model utility), and how much of it the model still writes by itself
text: ROUGE-L of generated texts
membership: whether a stranger can tell what was unlearned from what was never seen (loss, min-k, zlib; AUC, PrivLeak)
distance: of two adapters in the weights they change
recommendation: AUC of Yes against No as TALLRec computes it and without its detour, hit ratio and valid ratio of LLaRA
"""
