COPY bare_records (user_id, type, model, tokens, credits) FROM :rows;
