/* A region of a JPEG, resized: decoded and resized in one pass over its rows.
 *
 * What is outside the region goes through entropy decoding alone, and a row is resized while it is
 * in the processor's cache. The pixels are those of libjpeg-turbo's whole image resized by torch's
 * antialiased bicubic kernel for bytes: the same 16-bit weights, columns before rows, each rounded
 * to bytes. `jpeg_regions.py` says when it is used, and what is used where this was not compiled.
 *
 * libjpeg-turbo is the copy that Pillow brings, opened while running: every wheel of Pillow has
 * one, newer than most systems', and one decoder decides what is damaged. Its header is needed to
 * compile.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX2 1
#endif

/* Pixels decoded beyond the region on each side: chroma is interpolated between neighbours, which
 * a cut takes away. One or two would do; blocks are decoded whole anyway. */
enum { MARGIN = 4 };
/* Another number for another order of arguments: code and compiled part may differ in age. */
enum { INTERFACE = 1 };
enum { BYTES_PER_PIXEL = 4, CHANNELS = 3, ROWS_AT_ONCE = 8 };
/* Weights are padded with zeros to a multiple of this. */
enum { TAPS_AT_ONCE = 4 };
enum { PIXELS_AT_ONCE = 8 };
/* Rows have so many pixels more than the image: those that padding reads. */
enum { PADDING = 32 };
/* libjpeg-turbo writes a row that begins at a vector's boundary past the caches, to be read from
 * memory then: 5 times slower. So decoded rows begin one pixel behind a boundary. */
enum { BOUNDARY = 64 };
/* Weights at the largest step, and the padding. */
enum { MOST_TAPS = 24 };
/* Source pixels per resized pixel, far above what is asked for at full size (below 2). */
static const double LARGEST_STEP = 4.0;

/* ------------------------------------------------------------------ libjpeg */

typedef struct {
    struct jpeg_error_mgr *(*std_error)(struct jpeg_error_mgr *);
    void (*create)(j_decompress_ptr, int, size_t);
    void (*mem_src)(j_decompress_ptr, const unsigned char *, unsigned long);
    int (*read_header)(j_decompress_ptr, boolean);
    boolean (*start)(j_decompress_ptr);
    void (*crop)(j_decompress_ptr, JDIMENSION *, JDIMENSION *);
    JDIMENSION (*skip)(j_decompress_ptr, JDIMENSION);
    JDIMENSION (*read)(j_decompress_ptr, JSAMPARRAY, JDIMENSION);
    boolean (*finish)(j_decompress_ptr);
    void (*destroy)(j_decompress_ptr);
} Library;

static Library jpeg; /* all NULL until one is open */

typedef struct {
    struct jpeg_error_mgr base; /* first: libjpeg knows this part alone */
    jmp_buf on_error;
} ErrorManager;

static void leave(j_common_ptr info) { longjmp(((ErrorManager *)info->err)->on_error, 1); }

static void count_warning(j_common_ptr info, int level)
{
    if (level < 0) info->err->num_warnings++;
}

static int can_create(const Library *found)
{
    struct jpeg_decompress_struct info;
    ErrorManager errors;
    info.err = found->std_error(&errors.base);
    errors.base.error_exit = leave;
    if (setjmp(errors.on_error)) return 0; /* another version, or another layout of the struct */
    found->create(&info, JPEG_LIB_VERSION, sizeof info);
    found->destroy(&info);
    return 1;
}

static int find_symbol(void *library, const char *name, void *pointer)
{
    void *symbol = dlsym(library, name);
    memcpy(pointer, &symbol, sizeof symbol);
    return symbol != NULL;
}

static int bind(void *library)
{
    Library found;
    if (!(find_symbol(library, "jpeg_std_error", &found.std_error) &&
          find_symbol(library, "jpeg_CreateDecompress", &found.create) &&
          find_symbol(library, "jpeg_mem_src", &found.mem_src) &&
          find_symbol(library, "jpeg_read_header", &found.read_header) &&
          find_symbol(library, "jpeg_start_decompress", &found.start) &&
          find_symbol(library, "jpeg_crop_scanline", &found.crop) &&
          find_symbol(library, "jpeg_skip_scanlines", &found.skip) &&
          find_symbol(library, "jpeg_read_scanlines", &found.read) &&
          find_symbol(library, "jpeg_finish_decompress", &found.finish) &&
          find_symbol(library, "jpeg_destroy_decompress", &found.destroy) && can_create(&found)))
        return 0;
    jpeg = found;
    return 1;
}

/* ------------------------------------------------------------------ weights */

/* One axis: a run of resized pixels, made of a run of source pixels. */
typedef struct {
    Py_ssize_t first;       /* source pixel that resizing starts at */
    Py_ssize_t num_source;  /* source pixels from there on */
    double step;            /* source pixels per resized pixel */
    Py_ssize_t num_resized; /* resized pixels, of which the first are not wanted ... */
    Py_ssize_t skipped;     /* ... these */
} Axis;

typedef struct {
    int taps;      /* weights of each resized pixel, zeros at the end included */
    int used;      /* the most that are not padding */
    int precision; /* bits behind the point */
    int *begin;    /* first source pixel of each, from the axis' first; at last, of what is decoded */
    int *count;    /* source pixels of each */
    int16_t *weights;
} Weights;

static void free_weights(Weights *weights)
{
    free(weights->begin);
    free(weights->count);
    free(weights->weights);
}

static double cubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0) return ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a;
    return 0.0;
}

/* torch's weights, for all resized pixels: the precision hangs on the largest of them. */
static int make_weights(const Axis *axis, Weights *made)
{
    const double support = axis->step >= 1.0 ? 2.0 * axis->step : 2.0;
    const double inverse = axis->step >= 1.0 ? 1.0 / axis->step : 1.0;
    const int most = (int)ceil(support) * 2 + 1;
    const size_t length = (size_t)axis->num_resized;
    double largest = 0.0;
    memset(made, 0, sizeof *made);
    made->taps = (most + TAPS_AT_ONCE - 1) / TAPS_AT_ONCE * TAPS_AT_ONCE;
    made->begin = malloc(length * sizeof(int));
    made->count = malloc(length * sizeof(int));
    made->weights = calloc(length * made->taps, sizeof(int16_t));
    double *exact = calloc(length * made->taps, sizeof(double));
    if (!made->begin || !made->count || !made->weights || !exact) {
        free(exact);
        return 0;
    }
    for (size_t i = 0; i < length; i++) {
        double *row = exact + i * made->taps, total = 0.0;
        const double center = axis->step * ((double)i + 0.5);
        Py_ssize_t begin = (Py_ssize_t)(center - support + 0.5);
        Py_ssize_t end = (Py_ssize_t)(center + support + 0.5);
        if (begin < 0) begin = 0;
        if (end > axis->num_source) end = axis->num_source;
        Py_ssize_t count = end - begin;
        count = count < 0 ? 0 : count > most ? most : count;
        for (Py_ssize_t j = 0; j < count; j++) {
            row[j] = cubic(((double)(j + begin) - center + 0.5) * inverse);
            total += row[j];
        }
        for (Py_ssize_t j = 0; j < count && total != 0.0; j++) {
            row[j] /= total;
            if (row[j] > largest) largest = row[j];
        }
        made->begin[i] = (int)begin;
        made->count[i] = (int)count;
        if (count > made->used) made->used = (int)count;
    }
    while (made->precision < 22 && (int)(0.5 + largest * (1 << (made->precision + 1))) < 1 << 15)
        made->precision++;
    for (size_t i = 0; i < length * made->taps; i++) {
        const double scaled = exact[i] * (1 << made->precision);
        made->weights[i] = (int16_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    free(exact);
    return 1;
}

/* Whether each wanted pixel is made of source pixels that there are. */
static int is_within(const Weights *weights, Py_ssize_t skipped, Py_ssize_t side)
{
    for (Py_ssize_t i = skipped; i < skipped + side; i++)
        if (weights->count[i] < 1) return 0;
    return 1;
}

/* Mirror what the wanted pixels are made of. */
static void mirror(Weights *weights, Py_ssize_t skipped, Py_ssize_t side)
{
    for (Py_ssize_t i = skipped, j = skipped + side - 1; i < j; i++, j--) {
        const int begin = weights->begin[i], count = weights->count[i];
        int16_t *one = weights->weights + i * weights->taps;
        int16_t *other = weights->weights + j * weights->taps;
        weights->begin[i] = weights->begin[j];
        weights->count[i] = weights->count[j];
        weights->begin[j] = begin;
        weights->count[j] = count;
        for (int k = 0; k < weights->taps; k++) {
            const int16_t weight = one[k];
            one[k] = other[k];
            other[k] = weight;
        }
    }
}

/* ------------------------------------------------------------------ resizing */

typedef struct {
    const Weights *weights;
    Py_ssize_t skipped;
    Py_ssize_t side; /* resized pixels that are wanted */
    int taps;        /* as many as any of them has, and padding */
    int32_t *pairs;  /* weights of two pixels, two by two, each pair once for every channel */
} Run;

/* Lay weights out as vectors of the resized pixels want them. */
static void pair_weights(const Run *run)
{
    const Weights *weights = run->weights;
    int32_t *pairs = run->pairs;
    for (Py_ssize_t x = 0; x + 1 < run->side; x += 2)
        for (int t = 0; t < run->taps; t += 2)
            for (int k = 0; k < 2; k++) {
                int32_t pair;
                memcpy(&pair, weights->weights + (run->skipped + x + k) * weights->taps + t,
                       sizeof pair);
                for (int c = 0; c < BYTES_PER_PIXEL; c++) *pairs++ = pair;
            }
}

static uint8_t to_byte(int32_t value, int precision)
{
    value >>= precision;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Resize one decoded row; `planes` is at this row of the first channel. */
static void resize_columns_plain(const uint8_t *row, const Run *run, uint8_t *planes, size_t plane)
{
    const Weights *weights = run->weights;
    for (Py_ssize_t x = 0; x < run->side; x++) {
        const Py_ssize_t i = run->skipped + x;
        const int16_t *w = weights->weights + i * weights->taps;
        const uint8_t *pixel = row + (size_t)weights->begin[i] * BYTES_PER_PIXEL;
        int32_t sums[CHANNELS];
        for (int c = 0; c < CHANNELS; c++) sums[c] = 1 << (weights->precision - 1);
        for (int t = 0; t < weights->count[i]; t++)
            for (int c = 0; c < CHANNELS; c++) sums[c] += w[t] * pixel[t * BYTES_PER_PIXEL + c];
        for (int c = 0; c < CHANNELS; c++)
            planes[c * plane + x] = to_byte(sums[c], weights->precision);
    }
}

/* Resize one row's worth of columns: `rows` are those that it is made of, one for each weight. */
static void resize_rows_plain(const uint8_t *const *rows, const int16_t *w, int count,
                              int precision, Py_ssize_t side, uint8_t *out)
{
    for (Py_ssize_t x = 0; x < side; x++) {
        int32_t sum = 1 << (precision - 1);
        for (int t = 0; t < count; t++) sum += w[t] * rows[t][x];
        out[x] = to_byte(sum, precision);
    }
}

static void (*resize_columns)(const uint8_t *, const Run *, uint8_t *, size_t) =
    resize_columns_plain;
static void (*resize_rows)(const uint8_t *const *, const int16_t *, int, int, Py_ssize_t,
                           uint8_t *) = resize_rows_plain;

#ifdef HAS_AVX2
#define AVX2 __attribute__((target("avx2")))

/* Resize eight pixels at once, two in each vector, by pairs of taps: channel by channel, pairs of
 * source pixels times pairs of weights. Weights behind a pixel's last are zero, and rows are longer
 * than their pixels. */
AVX2 static inline void resize_columns_by(const uint8_t *row, const Run *run, uint8_t *planes,
                                          size_t plane, int taps)
{
    const __m256i first_pair = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i second_pair = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const __m256i by_channel = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const int precision = run->weights->precision;
    const __m256i half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    const int *begin = run->weights->begin + run->skipped;
    const __m256i *weights = (const __m256i *)run->pairs;
    for (Py_ssize_t x = 0; x < run->side; x += PIXELS_AT_ONCE, begin += PIXELS_AT_ONCE) {
        __m256i sums[PIXELS_AT_ONCE / 2];
        for (int k = 0; k < PIXELS_AT_ONCE / 2; k++) {
            const uint8_t *one = row + (size_t)begin[2 * k] * BYTES_PER_PIXEL;
            const uint8_t *other = row + (size_t)begin[2 * k + 1] * BYTES_PER_PIXEL;
            sums[k] = half;
            for (int t = 0; t < taps; t += TAPS_AT_ONCE, weights += 2) {
                const size_t at = (size_t)t * BYTES_PER_PIXEL;
                const __m256i pixels = _mm256_inserti128_si256(
                    _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(one + at))),
                    _mm_loadu_si128((const __m128i *)(other + at)), 1);
                sums[k] = _mm256_add_epi32(
                    sums[k], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, first_pair),
                                               _mm256_loadu_si256(weights)));
                sums[k] = _mm256_add_epi32(
                    sums[k], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, second_pair),
                                               _mm256_loadu_si256(weights + 1)));
            }
            sums[k] = _mm256_sra_epi32(sums[k], shift);
        }
        /* Even pixels are in the lower half, odd ones in the upper one. */
        const __m256i bytes = _mm256_shuffle_epi8(
            _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]),
                                _mm256_packs_epi32(sums[2], sums[3])),
            by_channel);
        const __m128i even = _mm256_castsi256_si128(bytes);
        const __m128i odd = _mm256_extracti128_si256(bytes, 1);
        const __m128i first_two = _mm_unpacklo_epi8(even, odd);
        _mm_storel_epi64((__m128i *)(planes + x), first_two);
        _mm_storeh_pd((double *)(planes + plane + x), _mm_castsi128_pd(first_two));
        _mm_storel_epi64((__m128i *)(planes + 2 * plane + x), _mm_unpackhi_epi8(even, odd));
    }
}

AVX2 static void resize_columns_avx2(const uint8_t *row, const Run *run, uint8_t *planes,
                                     size_t plane)
{
    /* A number that the compiler knows, where it is a usual one. */
    if (run->side % PIXELS_AT_ONCE) resize_columns_plain(row, run, planes, plane);
    else if (run->taps == 8) resize_columns_by(row, run, planes, plane, 8);
    else resize_columns_by(row, run, planes, plane, run->taps);
}

AVX2 static void resize_rows_avx2(const uint8_t *const *rows, const int16_t *w, int count,
                                  int precision, Py_ssize_t side, uint8_t *out)
{
    const __m256i half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    if (side % 16) {
        resize_rows_plain(rows, w, count, precision, side, out);
        return;
    }
    for (Py_ssize_t x = 0; x < side; x += 16) {
        __m256i low = half, high = half;
        /* Two rows at once; where the second is none, its weight is zero. */
        for (int t = 0; t < count; t += 2) {
            int two;
            memcpy(&two, w + t, sizeof two);
            const __m256i pair = _mm256_set1_epi32(two);
            const __m128i upper = _mm_loadu_si128((const __m128i *)(rows[t] + x));
            const __m128i lower = _mm_loadu_si128((const __m128i *)(rows[t + 1] + x));
            low = _mm256_add_epi32(
                low,
                _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(upper, lower)), pair));
            high = _mm256_add_epi32(
                high,
                _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(upper, lower)), pair));
        }
        low = _mm256_sra_epi32(low, shift);
        high = _mm256_sra_epi32(high, shift);
        const __m128i first =
            _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
        const __m128i second =
            _mm_packs_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        _mm_storeu_si128((__m128i *)(out + x), _mm_packus_epi16(first, second));
    }
}
#endif

/* ------------------------------------------------------------------ decoding */

typedef struct {
    const uint8_t *data;
    size_t size;
    Py_ssize_t height, width, side;
    int flip; /* left to right */
    Axis rows, columns;
    Weights row_weights, column_weights;
    uint8_t *out;     /* (3, side, side) */
    uint8_t *lines;   /* ROWS_AT_ONCE decoded rows, `stride` bytes from one to the next */
    size_t stride;
    int32_t *pairs;   /* of the columns' weights */
    uint8_t *resized; /* (rows, 3, side): the last rows with their columns resized, in a ring */
} Task;

static int is_ordinary(const struct jpeg_decompress_struct *info, const Task *task)
{
    if (info->image_height != (JDIMENSION)task->height) return 0;
    if (info->image_width != (JDIMENSION)task->width || info->data_precision != 8) return 0;
    if (info->jpeg_color_space == JCS_GRAYSCALE) return info->num_components == 1;
    if (info->jpeg_color_space != JCS_YCbCr && info->jpeg_color_space != JCS_RGB) return 0;
    if (info->num_components != 3) return 0;
    for (int c = 0; c < 3; c++) {
        /* 4:4:4, 4:2:2 and 4:2:0, which libjpeg-turbo skips rows and columns of as it should. */
        const jpeg_component_info *component = info->comp_info + c;
        const int h = component->h_samp_factor, v = component->v_samp_factor;
        if (c > 0 ? h != 1 || v != 1 : h > 2 || v > h) return 0;
    }
    return 1;
}

/* Make the rows that all decoded rows up to `end`, exclusive, suffice for. */
static Py_ssize_t finish_rows(const Task *task, Py_ssize_t done, Py_ssize_t end)
{
    const Weights *weights = &task->row_weights;
    const Py_ssize_t side = task->side, taps = weights->taps;
    const uint8_t *rows[MOST_TAPS];
    for (; done < side; done++) {
        const Py_ssize_t i = task->rows.skipped + done;
        if (weights->begin[i] + weights->count[i] > end) break;
        for (Py_ssize_t t = 0; t < taps; t++)
            rows[t] = task->resized + (weights->begin[i] + t) % taps * CHANNELS * side;
        for (int c = 0; c < CHANNELS; c++) {
            resize_rows(rows, weights->weights + i * taps, weights->count[i], weights->precision,
                        side, task->out + (c * side + done) * side);
            for (Py_ssize_t t = 0; t < taps; t++) rows[t] += side;
        }
    }
    return done;
}

/* Decode and resize; 0: the image is damaged, or unusual. */
static int run_task(Task *task)
{
    struct jpeg_decompress_struct info;
    ErrorManager errors;
    const int used = task->column_weights.used + TAPS_AT_ONCE - 1;
    const Run columns = {&task->column_weights, task->columns.skipped, task->side,
                         used / TAPS_AT_ONCE * TAPS_AT_ONCE, task->pairs};
    const Py_ssize_t last = task->side - 1;
    const Py_ssize_t first_column = task->columns.first + columns.weights->begin[columns.skipped];
    const Py_ssize_t end_column = task->columns.first +
                                  columns.weights->begin[columns.skipped + last] +
                                  columns.weights->count[columns.skipped + last];
    const Py_ssize_t first_row = task->rows.first + task->row_weights.begin[task->rows.skipped];
    const Py_ssize_t num_rows = task->rows.first + task->row_weights.begin[task->rows.skipped + last] +
                                task->row_weights.count[task->rows.skipped + last] - first_row;
    if (task->flip) mirror(&task->column_weights, columns.skipped, task->side);
    pair_weights(&columns);

    info.err = jpeg.std_error(&errors.base);
    errors.base.error_exit = leave;
    errors.base.emit_message = count_warning;
    if (setjmp(errors.on_error)) {
        jpeg.destroy(&info);
        return 0;
    }
    /* So that an error in `create` finds nothing to destroy. */
    memset(&info, 0, offsetof(struct jpeg_decompress_struct, client_data));
    info.err = &errors.base;
    jpeg.create(&info, JPEG_LIB_VERSION, sizeof info);
    jpeg.mem_src(&info, task->data, (unsigned long)task->size);
    jpeg.read_header(&info, TRUE);
    if (!is_ordinary(&info, task)) {
        jpeg.destroy(&info);
        return 0;
    }
    info.out_color_space = JCS_EXT_RGBX;
    jpeg.start(&info);

    JDIMENSION left = (JDIMENSION)(first_column > MARGIN ? first_column - MARGIN : 0);
    JDIMENSION width = (JDIMENSION)(end_column + MARGIN < task->width ? end_column + MARGIN
                                                                      : task->width) - left;
    jpeg.crop(&info, &left, &width); /* moves `left` to the edge of a block */
    if (left > (JDIMENSION)first_column || left + width < (JDIMENSION)end_column ||
        info.output_width > (JDIMENSION)task->width) {
        jpeg.destroy(&info);
        return 0;
    }
    for (Py_ssize_t x = 0; x < task->side; x++)
        task->column_weights.begin[columns.skipped + x] += (int)(task->columns.first - left);
    JSAMPROW lines[ROWS_AT_ONCE];
    for (int i = 0; i < ROWS_AT_ONCE; i++) lines[i] = task->lines + i * task->stride;
    const Py_ssize_t unused = first_row > MARGIN ? first_row - MARGIN : 0;
    if (unused) jpeg.skip(&info, (JDIMENSION)unused);
    /* Rows are counted from the axis' first, as their weights do. */
    const Py_ssize_t ring = task->row_weights.taps, first_needed = first_row - task->rows.first;
    Py_ssize_t done = 0;
    while ((Py_ssize_t)info.output_scanline < first_row + num_rows) {
        const Py_ssize_t at = (Py_ssize_t)info.output_scanline;
        Py_ssize_t wanted = first_row + num_rows - at;
        if (wanted > ROWS_AT_ONCE) wanted = ROWS_AT_ONCE;
        const Py_ssize_t read = (Py_ssize_t)jpeg.read(&info, lines, (JDIMENSION)wanted);
        if (read < 1) leave((j_common_ptr)&info);
        for (Py_ssize_t i = 0; i < read; i++) {
            const Py_ssize_t row = at + i - task->rows.first;
            if (row < first_needed) continue;
            resize_columns(lines[i], &columns,
                           task->resized + row % ring * CHANNELS * task->side, task->side);
            done = finish_rows(task, done, row + 1);
        }
    }
    /* All views of an image see its damage. Skipping up to the end would look at no byte of it:
     * the last row is read. */
    if (info.output_scanline + 1 < info.output_height)
        jpeg.skip(&info, info.output_height - 1 - info.output_scanline);
    while (info.output_scanline < info.output_height)
        if (jpeg.read(&info, lines, 1) < 1) leave((j_common_ptr)&info);
    jpeg.finish(&info);
    const long warnings = errors.base.num_warnings;
    jpeg.destroy(&info);
    return !warnings && done == task->side;
}

/* Whether an axis is one that `run_task` can do within its buffers. */
static int is_valid(const Axis *axis, Py_ssize_t length, Py_ssize_t side)
{
    return axis->first >= 0 && axis->num_source > 0 && axis->first <= length - axis->num_source &&
           axis->step > 0.0 && axis->step <= LARGEST_STEP && axis->skipped >= 0 &&
           axis->num_resized <= 1 << 20 && axis->skipped <= axis->num_resized - side;
}

/* What came of a task: done, left to others (damaged or unusual), or asked for wrongly. */
enum { LEFT, DONE, OUTSIDE };

static int prepare_and_run(Task *task)
{
    const size_t pixels = (size_t)task->width + PADDING + 1;
    uint8_t *lines = NULL;
    int result = LEFT;
    task->stride = (pixels * BYTES_PER_PIXEL + BOUNDARY - 1) / BOUNDARY * BOUNDARY;
    memset(&task->row_weights, 0, sizeof task->row_weights);
    memset(&task->column_weights, 0, sizeof task->column_weights);
    if (make_weights(&task->rows, &task->row_weights) &&
        make_weights(&task->columns, &task->column_weights)) {
        /* Zeros, since what has no weight is read as well. */
        lines = calloc(task->stride * ROWS_AT_ONCE + BOUNDARY, 1);
        if (lines) task->lines = lines + BOUNDARY - (uintptr_t)lines % BOUNDARY + BYTES_PER_PIXEL;
        task->resized = calloc((size_t)task->row_weights.taps * CHANNELS, task->side);
        task->pairs = malloc((size_t)task->side * task->column_weights.taps * sizeof(int32_t) * 2);
        if (!is_within(&task->row_weights, task->rows.skipped, task->side) ||
            !is_within(&task->column_weights, task->columns.skipped, task->side))
            result = OUTSIDE;
        else if (lines && task->resized && task->pairs && run_task(task))
            result = DONE;
    }
    free_weights(&task->row_weights);
    free_weights(&task->column_weights);
    free(lines);
    free(task->resized);
    free(task->pairs);
    return result;
}

/* ------------------------------------------------------------------ the module */

static PyObject *resize_region(PyObject *self, PyObject *arguments)
{
    Task task;
    Py_buffer data, out;
    (void)self;
    memset(&task, 0, sizeof task);
    if (!PyArg_ParseTuple(arguments, "y*nn(nndnn)(nndnn)npw*", &data, &task.height, &task.width,
                          &task.rows.first, &task.rows.num_source, &task.rows.step,
                          &task.rows.num_resized, &task.rows.skipped, &task.columns.first,
                          &task.columns.num_source, &task.columns.step, &task.columns.num_resized,
                          &task.columns.skipped, &task.side, &task.flip, &out))
        return NULL;
    int result = OUTSIDE;
    if (!jpeg.create) {
        PyErr_SetString(PyExc_RuntimeError, "resize_region: no library is open");
    }
    else if (task.side >= 1 && task.side <= 1 << 14 &&
             out.len == CHANNELS * task.side * task.side && task.height >= 1 &&
             task.width >= 1 && task.height <= 65535 && task.width <= 65535 &&
             is_valid(&task.rows, task.height, task.side) &&
             is_valid(&task.columns, task.width, task.side)) {
        task.data = data.buf;
        task.size = (size_t)data.len;
        task.out = out.buf;
        Py_BEGIN_ALLOW_THREADS
        result = prepare_and_run(&task);
        Py_END_ALLOW_THREADS
    }
    if (result == OUTSIDE && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "resize_region: a region outside the image");
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(result == DONE);
}

static PyObject *open_library(PyObject *self, PyObject *path)
{
    (void)self;
    PyObject *encoded = PyUnicode_EncodeFSDefault(path);
    if (!encoded) return NULL;
    char *name = PyBytes_AsString(encoded);
    void *library = name ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : NULL;
    const int is_bound = library && bind(library);
    if (library && !is_bound) dlclose(library);
    Py_DECREF(encoded);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(is_bound);
}

static PyMethodDef methods[] = {
    {"open_library", open_library, METH_O,
     "Use the libjpeg-turbo at a path; False if it is none, or does not fit the header."},
    {"resize_region", resize_region, METH_VARARGS,
     "Decode a region and resize it into a buffer; False if the image is damaged or unusual."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_fqgan_jpeg_regions", "Regions of JPEGs, decoded and resized at once.",
    -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fqgan_jpeg_regions(void)
{
#ifdef HAS_AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        resize_columns = resize_columns_avx2;
        resize_rows = resize_rows_avx2;
    }
#endif
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE)) Py_CLEAR(made);
    return made;
}
