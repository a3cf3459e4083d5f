"""`unlearn-jax {train,erase,eval}`: an adapter of the quickstart's vision-language model memorises traces and is edited.

train     trains an adapter to convergence on a fixed set of traces
erase     edits the adapter by requests to remove traces, correct answers and change questions
eval      compares the edited adapter with a warm retrain on the edited traces, and with baselines at the cost of the edit
"""
