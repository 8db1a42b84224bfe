/* Starts a test program as the ranks of a job. */
#ifndef TM_TESTS_HARNESS_RANK_JOB_H
#define TM_TESTS_HARNESS_RANK_JOB_H

/* Runs `program` of this program's folder (NULL: this program itself) with the arguments that format gives as `ranks`
 * ranks, under mpirun or what the variable TM_MPIRUN names in its place, at most limit_s seconds. What the ranks print
 * goes to standard output. Gives the job's exit status; fails the test where it was killed. */
__attribute__((format(printf, 5, 6))) int rank_job(const char *mpirun, const char *program,
                                                   int ranks, int limit_s, const char *format, ...);

#endif
