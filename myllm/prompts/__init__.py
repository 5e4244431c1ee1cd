"""Messages → prompt tokens: chat templates, their sandbox, and what of a text or conversation fits.

Knows a tokenizer only by its interface (`myllm.tokenizer`); must not import engine, models or storage.
"""
