"""Running what cannot be trusted: verifiers on a model's answers, chat templates of downloaded tokenizers.

A confined process imports what it needs, gives up its rights (`kernel`), and forks workers that give up the
rest (`server`). The trainer talks to it over two pipes with deadlines on reading and writing (`process`) and
believes nothing but JSON. `evaluation` decides what text a worker's libraries may evaluate.
"""
