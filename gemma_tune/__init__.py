"""QLoRA fine-tuning of Google's Gemma: from a recipe to a merged model that is proven to be what was trained."""
