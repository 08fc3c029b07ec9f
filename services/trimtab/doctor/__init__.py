"""What `trimtab doctor` looks at before a recipe burns a GPU hour, one file a question; each answers in `Finding`s.

`plan` says what the files ask for, `examination` asks every question in turn. Nothing here trains, and nothing stays
behind in a store or a service.
"""
