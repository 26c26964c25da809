"""Runs untrusted input: verifiers on a model's answers, chat templates of downloaded tokenizers.

A confined process imports what it needs, drops privileges (`kernel`), and forks workers that drop the
remaining ones (`server`). The trainer talks to it over two pipes with deadlines on reading and writing
(`process`) and accepts only JSON. `evaluation` decides which text a worker's libraries may evaluate.
"""
