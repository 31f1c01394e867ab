class PageInk:
    blank=False; num_glyphs=None
def plausible_output_chars(ink): return 100000
