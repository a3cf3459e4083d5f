"""`unlearn-jax {train,erase,eval}`: an adapter of the quickstart's vision-language model memorises traces and is edited.

train     an adapter to convergence on a fixed set of traces
erase     the edited adapter, for a request of traces to remove, answers to correct and questions to change
eval      compares it with a warm retrain on the edited traces, and with first-order baselines at the cost of the edit
"""
