"""From retrieval to prognosis: what becomes of patients, from the features of their films and what is known of them."""
