def tables(study, rows):
  return str(rows[-1])


def draw(study, rows):
  pass


def update(study, rows):
  pass
