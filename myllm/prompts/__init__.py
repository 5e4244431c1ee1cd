"""Messages → prompt tokens: chat templates, their sandbox, and what of a text fits the window.

Knows a tokenizer only by its interface (`myllm.tokenizer`); must not import engine, models or storage.
"""
